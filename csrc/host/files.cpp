#include "fastlora/files.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace fastlora {

// A signal only interrupts a write; it is taken up again.
int write_all(int64_t file, const char* data, int64_t bytes, int64_t offset) {
    if (file > kLargestDescriptor) {
        memcpy(reinterpret_cast<char*>(file) + offset, data, size_t(bytes));
        return 0;
    }
    while (bytes > 0) {
        const ssize_t written = pwrite(int(file), data, size_t(bytes), off_t(offset));
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) return errno;
        if (written == 0) return EIO;
        data += written, bytes -= written, offset += written;
    }
    return 0;
}

int read_all(int file, char* data, int64_t bytes, int64_t offset) {
    while (bytes > 0) {
        const ssize_t found = pread(file, data, size_t(bytes), off_t(offset));
        if (found < 0 && errno == EINTR) continue;
        if (found < 0) return errno;
        if (found == 0) return kEndOfFile;
        data += found, bytes -= found, offset += found;
    }
    return 0;
}

}  // namespace fastlora
