// Chooses the kernel table: the best instruction set of this processor, or the one named by FASTLORA_ISA.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(FASTLORA_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "fastlora/kernels.h"

namespace fastlora {

namespace baseline {
extern const Kernels table;
}
#if defined(FASTLORA_X86)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
#endif
#if defined(FASTLORA_AMX)
namespace amx {
extern const Kernels table;
}
#endif

namespace {

struct Candidate {
    const Kernels* table;
    bool runs;
};

#if defined(FASTLORA_AMX)
// Whether there are bfloat16 tiles and the system lets this process use their registers, which it must be asked for.
bool may_use_tiles() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if ((d & kBf16) == 0 || (d & kTile) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const Kernels& choose() {
#if defined(FASTLORA_X86)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    const Candidate candidates[] = {
#if defined(FASTLORA_AMX)
        {&amx::table, has_bf16 && may_use_tiles()},
#endif
        {&avx512_bf16::table, has_bf16},
        {&avx512::table, has_avx512},
        {&avx2::table, has_avx2},
        {&baseline::table, true}};
#else
    const Candidate candidates[] = {{&baseline::table, true}};
#endif
    const char* wanted = std::getenv("FASTLORA_ISA");
    std::string names;
    for (const Candidate& c : candidates) {
        names += std::string(names.empty() ? "" : ", ") + c.table->name;
        if (wanted == nullptr || *wanted == '\0') {
            if (c.runs) return *c.table;
        } else if (std::strcmp(wanted, c.table->name) == 0) {
            if (c.runs) return *c.table;
            throw std::runtime_error("FASTLORA_ISA=" + std::string(wanted) +
                                     ": this processor does not run it; unset the variable or name a lower one of " +
                                     names);
        }
    }
    throw std::runtime_error("FASTLORA_ISA=" + std::string(wanted) + ": no such instruction set; use one of " + names);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace fastlora
