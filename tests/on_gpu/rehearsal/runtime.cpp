// A stand-in for libcudart.so.13 on a machine without a GPU. Device memory is host memory. Work is put into the queue
// of its stream and done as late as a device may: when somebody waits for it. So a missing wait shows.
// torch's own kernels are never launched (aten.py does their work); launches of the package's are checked and counted.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <string>

#include "queue.h"

namespace {

constexpr size_t kMemory = size_t(8) << 30;
constexpr int kMultiprocessors = 132, kSharedWithoutAsking = 48 * 1024, kSharedLargest = 227 * 1024;
constexpr int kMajor = 9, kMinor = 0, kWarp = 32, kThreads = 1024;

enum class Kind { kDevice, kPinned, kPageable };

struct Block {
    size_t size;
    Kind kind;
};

std::mutex memory_lock;
std::map<uintptr_t, Block> blocks;
size_t taken = 0;

std::mutex kernel_lock;
std::map<const void*, std::string> kernel_names;
std::map<const void*, int> shared_allowed;
long launches = 0;

// Static shared memory of the package's kernels, which the table of run.py has; 0 for torch's.
int static_shared(const std::string& name) {
    static const std::map<std::string, int> table = [] {
        std::map<std::string, int> found;
        std::ifstream file(std::getenv("REHEARSAL_STATIC_SHARED"));
        for (auto [kernel, bytes] = std::pair<std::string, int>(); file >> kernel >> bytes;) found[kernel] = bytes;
        return found;
    }();
    const auto found = table.find(name);
    if (found != table.end()) return found->second;
    if (name.find("fastlora") == std::string::npos) return 0;
    std::fprintf(stderr, "rehearsal: the compiler's table lacks %s\n", name.c_str());
    std::abort();
}

thread_local cudaError_t last_error = cudaSuccess;
bool capturing = false;
cudaStream_t captured = nullptr;

cudaError_t failed(cudaError_t error, const char* what) {
    if (error != cudaErrorMemoryAllocation) std::fprintf(stderr, "rehearsal: %s\n", what);
    return last_error = error;
}

cudaError_t refuse_while_capturing(const char* what) {
    return capturing ? failed(cudaErrorStreamCaptureUnsupported, what) : cudaSuccess;
}

cudaError_t allocate(void** pointer, size_t size, Kind kind) {
    std::lock_guard guard(memory_lock);
    if (kind == Kind::kDevice && taken + size > kMemory) return failed(cudaErrorMemoryAllocation, "memory");
    void* found = nullptr;
    if (posix_memalign(&found, 512, std::max<size_t>(size, 1))) return failed(cudaErrorMemoryAllocation, "memory");
    std::memset(found, 0xff, size);  // NaN
    blocks[uintptr_t(found)] = {size, kind};
    if (kind == Kind::kDevice) taken += size;
    *pointer = found;
    return cudaSuccess;
}

cudaError_t release(void* pointer) {
    if (pointer == nullptr) return cudaSuccess;
    do_everything();
    std::lock_guard guard(memory_lock);
    const auto found = blocks.find(uintptr_t(pointer));
    if (found == blocks.end()) return failed(cudaErrorInvalidValue, "an address that was not allocated is freed");
    if (found->second.kind == Kind::kDevice) taken -= found->second.size;
    blocks.erase(found);
    std::free(pointer);
    return cudaSuccess;
}

Kind kind_of(const void* pointer) {
    std::lock_guard guard(memory_lock);
    auto found = blocks.upper_bound(uintptr_t(pointer));
    if (found == blocks.begin()) return Kind::kPageable;
    --found;
    return uintptr_t(pointer) < found->first + found->second.size ? found->second.kind : Kind::kPageable;
}

// From pageable memory CUDA takes a copy before it returns; to pageable memory it waits.
cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t stream) {
    if (size == 0) return cudaSuccess;
    if (kind_of(from) == Kind::kPageable && kind_of(to) == Kind::kDevice) {
        const std::string held(static_cast<const char*>(from), size);
        enqueue(stream, [=] { std::memcpy(to, held.data(), size); });
        return cudaSuccess;
    }
    enqueue(stream, [=] { std::memmove(to, from, size); });
    if (kind_of(to) == Kind::kPageable) do_all_of(stream);
    return cudaSuccess;
}

}  // namespace

extern "C" {

// What the Python side calls.
void rehearsal_enqueue(void* stream, void (*job)(long), long id) {
    enqueue(static_cast<cudaStream_t>(stream), [=] { job(id); });
}
void rehearsal_wait(void* stream) { do_all_of(static_cast<cudaStream_t>(stream)); }
bool rehearsal_capturing() { return capturing; }
bool rehearsal_pinned(const void* pointer) { return kind_of(pointer) == Kind::kPinned; }
long rehearsal_launches() { return launches; }
// The first kernel with that text in its name, and its static shared memory.
const void* rehearsal_kernel(const char* part, int* bytes) {
    std::lock_guard guard(kernel_lock);
    for (const auto& [kernel, name] : kernel_names)
        if (name.find(part) != std::string::npos) return *bytes = static_shared(name), kernel;
    return nullptr;
}

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : error == cudaSuccess ? "no error" : "an error";
}
const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : failed(cudaErrorInvalidDevice, "there is one device");
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* name, int size, int) {
    std::snprintf(name, size_t(size), "0000:00:00.0");
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
    std::memset(found, 0, sizeof *found);
    std::snprintf(found->name, sizeof found->name, "no device (rehearsal)");
    found->totalGlobalMem = kMemory;
    found->major = kMajor, found->minor = kMinor;
    found->multiProcessorCount = kMultiprocessors;
    found->warpSize = kWarp;
    found->maxThreadsPerBlock = kThreads, found->maxThreadsPerMultiProcessor = 2 * kThreads;
    found->sharedMemPerBlock = kSharedWithoutAsking, found->sharedMemPerBlockOptin = kSharedLargest;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->l2CacheSize = 50 << 20;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = kSharedLargest;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlock:
            *value = kSharedWithoutAsking;
            break;
        case cudaDevAttrComputeCapabilityMajor:
            *value = kMajor;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = kMinor;
            break;
        case cudaDevAttrMultiProcessorCount:
            *value = kMultiprocessors;
            break;
        default:
            return failed(cudaErrorInvalidValue, "an attribute that the stand-in does not know");
    }
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
    std::lock_guard guard(memory_lock);
    return *left = kMemory - taken, *total = kMemory, cudaSuccess;
}
cudaError_t cudaMalloc(void** pointer, size_t size) { return allocate(pointer, size, Kind::kDevice); }
cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) { return allocate(pointer, size, Kind::kPinned); }
cudaError_t cudaFree(void* pointer) { return release(pointer); }
cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
    const Kind kind = kind_of(pointer);
    std::memset(found, 0, sizeof *found);
    found->type = kind == Kind::kDevice   ? cudaMemoryTypeDevice
                  : kind == Kind::kPinned ? cudaMemoryTypeHost
                                          : cudaMemoryTypeUnregistered;
    found->devicePointer = kind == Kind::kPageable ? nullptr : const_cast<void*>(pointer);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
    return copy(to, from, size, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    if (const cudaError_t error = refuse_while_capturing("cudaMemcpy in a capture")) return error;
    copy(to, from, size, nullptr);
    do_all_of(nullptr);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
    enqueue(stream, [=] { std::memset(to, value, size); });
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    if (const cudaError_t error = refuse_while_capturing("cudaDeviceSynchronize in a capture")) return error;
    do_everything();
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (const cudaError_t error = refuse_while_capturing("cudaStreamSynchronize in a capture")) return error;
    do_all_of(stream);
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return is_done(stream) ? cudaSuccess : cudaErrorNotReady; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
    static std::atomic<uintptr_t> next{0x1000};
    return *stream = reinterpret_cast<cudaStream_t>(next += 16), cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    enqueue(stream, [=] { function(data); });
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return *event = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  // a queue may still name it
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    if (!capturing) record(*reinterpret_cast<Event*>(event), stream);
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    if (!capturing) wait_for(stream, *reinterpret_cast<Event*>(event));
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    return is_done(*reinterpret_cast<Event*>(event)) ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (const cudaError_t error = refuse_while_capturing("cudaEventSynchronize in a capture")) return error;
    do_until(*reinterpret_cast<Event*>(event));
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t first, cudaEvent_t second) {
    const std::chrono::duration<float, std::milli> between =
        reinterpret_cast<Event*>(second)->at - reinterpret_cast<Event*>(first)->at;
    return *milliseconds = between.count(), cudaSuccess;
}

// What a capture holds is kept by streams.py; here is only that there is one.
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    *status = capturing && stream == captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t**, const cudaGraphEdgeData**,
                                     size_t* count) {
    if (id) *id = 1;
    if (graph) *graph = nullptr;
    if (count) *count = 0;
    return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (stream == nullptr) return failed(cudaErrorStreamCaptureUnsupported, "the default stream is captured");
    return capturing = true, captured = stream, cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    return capturing = false, *graph = reinterpret_cast<cudaGraph_t>(1), cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t, unsigned long long) {
    return *made = reinterpret_cast<cudaGraphExec_t>(1), cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

// torch takes functions of the driver by name; those that driver.cpp lacks are said to be there and are never called.
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    static void* const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    *function = dlsym(driver, name);
    if (*function == nullptr) *function = dlsym(driver, "rehearsal_not_there");
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

void** __cudaRegisterFatBinary(void*) {
    static void* handle = nullptr;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    std::lock_guard guard(kernel_lock);
    kernel_names[kernel] = name;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    return *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function)), cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void* kernel) {
    std::lock_guard guard(kernel_lock);
    if (std::getenv("REHEARSAL_WITHOUT_CODE")) return last_error = cudaErrorNoKernelImageForDevice;
    if (!kernel_names.count(kernel)) return failed(cudaErrorInvalidDeviceFunction, "a kernel that nobody registered");
    std::memset(found, 0, sizeof *found);
    found->sharedSizeBytes = size_t(static_shared(kernel_names[kernel]));
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    std::lock_guard guard(kernel_lock);
    const int largest = kSharedLargest - static_shared(kernel_names[kernel]);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > largest)
        return failed(cudaErrorInvalidValue, "more shared memory is asked for than a block may have");
    shared_allowed[kernel] = value;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 blocks_, dim3 threads, void** arguments, size_t shared,
                             cudaStream_t) {
    std::lock_guard guard(kernel_lock);
    const std::string& name = kernel_names[kernel];
    if (name.find("fastlora") == std::string::npos) {
        std::fprintf(stderr, "rehearsal: torch launches %s: its op is missing in aten.py\n", name.c_str());
        std::abort();
    }
    const auto allowed = shared_allowed.find(kernel);
    const size_t largest =
        allowed == shared_allowed.end() ? kSharedWithoutAsking - static_shared(name) : size_t(allowed->second);
    if (blocks_.x == 0 || blocks_.y != 1 || blocks_.z != 1 || threads.x == 0 || threads.x > kThreads ||
        threads.y != 1 || threads.z != 1 || shared > largest || arguments == nullptr)
        return failed(cudaErrorInvalidValue, ("a launch that CUDA would refuse: " + name).c_str());
    launches++;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 blocks_, dim3 threads, void** arguments, size_t shared,
                               cudaStream_t stream) {
    return cudaLaunchKernel(kernel, blocks_, threads, arguments, shared, stream);
}
// Of a launch written as <<<>>>, which torch's kernels are.
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3* blocks_, dim3* threads, size_t* shared, void* stream) {
    *blocks_ = *threads = dim3(1), *shared = 0, *static_cast<cudaStream_t*>(stream) = nullptr;
    return cudaSuccess;
}

}  // extern "C"
