// A stand-in for libcuda.so.1: what Triton's launcher calls. Compiled kernels are taken as they are and their launches
// checked and counted; kernels.py does their work, with the fused multiply-adds that are here.
#include <cuda.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

constexpr int kSharedWithoutAsking = 48 * 1024, kSharedLargest = 227 * 1024;

struct Function {
    std::string name;
    int shared_allowed = kSharedWithoutAsking;
};

std::mutex lock;
std::map<std::string, Function> functions;
long launches = 0;

CUresult failed(const char* what) {
    std::fprintf(stderr, "rehearsal: %s\n", what);
    return CUDA_ERROR_INVALID_VALUE;
}

template <class T>
void fused(long count, const T* x, const T* y, const T* z, T* out) {
    for (long i = 0; i < count; ++i) out[i] = std::fma(x[i], y[i], z[i]);
}

}  // namespace

extern "C" {

long rehearsal_triton_launches() { return launches; }
CUresult rehearsal_not_there() { return CUDA_ERROR_NOT_SUPPORTED; }
void rehearsal_fma_float32(long count, const float* x, const float* y, const float* z, float* out) {
    fused(count, x, y, z, out);
}
void rehearsal_fma_float64(long count, const double* x, const double* y, const double* z, double* out) {
    fused(count, x, y, z, out);
}

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = reinterpret_cast<CUcontext>(1), CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return cuCtxGetCurrent(context); }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
            *value = kSharedLargest;
            break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
            *value = kSharedLargest + 1024;
            break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
            *value = 132;
            break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
            *value = 65536;
            break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
            *value = 32;
            break;
        default:
            *value = 1;  // clock rates and the like
    }
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) { return *text = "refused by the stand-in", CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    if (std::memcmp(image, "\177ELF", 4) != 0) return failed("a module that is no compiled kernel");
    return *module = reinterpret_cast<CUmodule>(1), CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
    std::lock_guard guard(lock);
    functions[name].name = name;
    return *function = reinterpret_cast<CUfunction>(&functions[name]), CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
    return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (value > kSharedLargest) return failed("more shared memory is asked for than a block may have");
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
        reinterpret_cast<Function*>(function)->shared_allowed = value;
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
    std::lock_guard guard(lock);
    const auto& own = *reinterpret_cast<Function*>(function);
    if (config->gridDimX == 0 || config->gridDimY != 1 || config->gridDimZ != 1 || config->blockDimX > 1024 ||
        int(config->sharedMemBytes) > own.shared_allowed || arguments == nullptr)
        return failed(("a launch that CUDA would refuse: " + own.name).c_str());
    launches++;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return failed("an attribute of a pointer");
    return *static_cast<CUdeviceptr*>(value) = pointer, CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned, CUpointer_attribute*, void**, CUdeviceptr) {
    return failed("attributes of a pointer");
}
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    return failed("tensor maps");
}
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
    return *count = 1, CUDA_SUCCESS;
}

}  // extern "C"
