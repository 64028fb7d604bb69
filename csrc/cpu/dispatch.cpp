// Chooses the kernel table: the best instruction set of this processor, or the one named by FASTLORA_ISA.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

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

namespace {

struct Candidate {
    const Kernels* table;
    bool runs;
};

const Kernels& choose() {
#if defined(FASTLORA_X86)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    const Candidate candidates[] = {{&avx512_bf16::table, has_bf16},
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
