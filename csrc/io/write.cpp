// One call for many tensors: a Python thread that writes them one by one would wait for the interpreter at each.
#include <unistd.h>

#include <cerrno>

#include "fastlora/io.h"

namespace fastlora {
namespace {

// 0, or the errno of what went wrong. A signal only interrupts a write; it is taken up again.
int write_all(int file, const char* data, int64_t bytes, int64_t offset) {
    while (bytes > 0) {
        const ssize_t written = pwrite(file, data, size_t(bytes), off_t(offset));
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) return errno;
        if (written == 0) return EIO;
        data += written, bytes -= written, offset += written;
    }
    return 0;
}

}  // namespace

WriteResult write_pieces(int file, const Piece* pieces, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const Piece& piece = pieces[i];
        if (piece.check && !kernels().finite(piece.matrix)) return {kNotFinite, i, 0};
        const int error = write_all(file, reinterpret_cast<const char*>(piece.matrix.data), piece.bytes, piece.offset);
        if (error) return {kSystemError, i, error};
    }
    return {kWritten, 0, 0};
}

}  // namespace fastlora
