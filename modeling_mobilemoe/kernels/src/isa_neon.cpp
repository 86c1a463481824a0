// Arm NEON with dot products (Armv8.2): 16 products per instruction.
#include "neon.h"

namespace mobilemoe {
namespace {

template <int kTokens, int kVectors>
void multiply_columns(const uint8_t* columns, int num_inputs, const int8_t* const* x, const int32_t* offsets,
                      Sums<kVectors>* sums) {
  dot_products<kTokens, kVectors>(columns, num_inputs, x, offsets, sums);
}

bool supported() { return has_dot_products(); }

}  // namespace

const Isa kNeon = {
    "neon",        supported,     quantize_cells, kArmTokens, multiply_tile, quantize_groups, kArmTokens,
    multiply_rows, router_logits, sigmoid,        add,        silu_multiply, rms_norm,        rotate_and_normalize,
    attend,        merge_row,     quantize_head,  expand_row, from_bf16,     to_bf16};

}  // namespace mobilemoe
