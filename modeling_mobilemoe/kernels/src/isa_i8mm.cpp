// Arm NEON with matrix products (Armv8.6, i8mm): 2 tokens by 2 outputs by 8 inputs per instruction. One token has the
// dot products of neon.h.
#include "neon.h"

namespace mobilemoe {
namespace {

// An odd last token is its own partner, and its second result is dropped.
template <int kTokens, int kVectors>
__attribute__((always_inline)) inline void matrix_products(const uint8_t* columns, int num_inputs,
                                                           const int8_t* const* x, const int32_t* offsets,
                                                           Sums<kVectors>* sums) {
  constexpr int kPairs = (kTokens + 1) / 2;
  // Of a vector of a column: outputs 0 and 1, 2 and 3, 16 and 17, 18 and 19, each for the first token and the second.
  int32x4_t pairs[kPairs][kVectors][4];
  const auto partner = [](int p) { return 2 * p + 1 < kTokens ? 2 * p + 1 : 2 * p; };
  for (int p = 0; p < kPairs; ++p) {
    const int32x4_t offset = vcombine_s32(vdup_n_s32(offsets[2 * p]), vdup_n_s32(offsets[partner(p)]));
    for (int i = 0; i < kVectors; ++i) {
      for (int j = 0; j < 4; ++j) pairs[p][i][j] = offset;
    }
  }
  int k = 0;
  do {
    // 8 inputs of both tokens, and the next 8.
    int8x16_t cells[2][kPairs];
    for (int p = 0; p < kPairs; ++p) {
      const int64x2_t first = vreinterpretq_s64_s8(vld1q_s8(x[2 * p] + k));
      const int64x2_t second = vreinterpretq_s64_s8(vld1q_s8(x[partner(p)] + k));
      cells[0][p] = vreinterpretq_s8_s64(vzip1q_s64(first, second));
      cells[1][p] = vreinterpretq_s8_s64(vzip2q_s64(first, second));
    }
    for (int c = 0; c < 2; ++c) {
      const uint8_t* column = columns + (k / kCellBytes + 2 * c) * kColumnBytes;
      for (int i = 0; i < kVectors; ++i) {
        const uint32x4_t first = vreinterpretq_u32_u8(vld1q_u8(column + i * kVectorBytes));
        const uint32x4_t second = vreinterpretq_u32_u8(vld1q_u8(column + kColumnBytes + i * kVectorBytes));
        const uint8x16_t packed[2] = {vreinterpretq_u8_u32(vzip1q_u32(first, second)),
                                      vreinterpretq_u8_u32(vzip2q_u32(first, second))};
        for (int j = 0; j < 2; ++j) {
          const int8x16_t low = low_nibbles(packed[j]), high = high_nibbles(packed[j]);
          for (int p = 0; p < kPairs; ++p) {
            pairs[p][i][j] = vmmlaq_s32(pairs[p][i][j], cells[c][p], low);
            pairs[p][i][2 + j] = vmmlaq_s32(pairs[p][i][2 + j], cells[c][p], high);
          }
        }
      }
    }
    k += 16;
  } while (k < num_inputs);
  for (int p = 0; p < kPairs; ++p) {
    for (int i = 0; i < kVectors; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int64x2_t first = vreinterpretq_s64_s32(pairs[p][i][2 * half]);
        const int64x2_t second = vreinterpretq_s64_s32(pairs[p][i][2 * half + 1]);
        sums[2 * p][half][i] = vreinterpretq_s32_s64(vzip1q_s64(first, second));
        if (2 * p + 1 < kTokens) sums[2 * p + 1][half][i] = vreinterpretq_s32_s64(vzip2q_s64(first, second));
      }
    }
  }
}

template <int kTokens, int kVectors>
void multiply_columns(const uint8_t* columns, int num_inputs, const int8_t* const* x, const int32_t* offsets,
                      Sums<kVectors>* sums) {
  if constexpr (kTokens == 1) {
    dot_products<kTokens, kVectors>(columns, num_inputs, x, offsets, sums);
  } else {
    matrix_products<kTokens, kVectors>(columns, num_inputs, x, offsets, sums);
  }
}

bool supported() { return has_dot_products() && has_matrix_products(); }

}  // namespace

const Isa kI8mm = {
    "i8mm",        supported,     quantize_cells, kArmTokens, multiply_tile, quantize_groups, kArmTokens,
    multiply_rows, router_logits, sigmoid,        add,        silu_multiply, rms_norm,        rotate_and_normalize,
    attend,        merge_row,     quantize_head,  expand_row, from_bf16,     to_bf16};

}  // namespace mobilemoe
