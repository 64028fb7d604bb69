// What the headers of newer systems refer to and older systems lack: linked in where a module is made for those too.

// Whether the process never had a second thread, so that a count needs no atomic operations: it may have.
extern "C" {
__attribute__((visibility("hidden"))) extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}
