// The kernel table of one instruction set.
#include "table.h"

#define FASTLORA_STRING_(x) #x
#define FASTLORA_STRING(x) FASTLORA_STRING_(x)

namespace fastlora::FASTLORA_ISA {

extern const Kernels table;
const Kernels table = {FASTLORA_STRING(FASTLORA_ISA),
                       gram,
                       combine,
                       chain,
                       merge_select,
                       merge_row_masks,
                       merge_tiles,
                       similarity,
                       add_products,
                       tucker,
                       difference_products,
                       finite,
                       eigh<float>,
                       eigh<double>,
                       svd<float>,
                       svd<double>};

}  // namespace fastlora::FASTLORA_ISA
