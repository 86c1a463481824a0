// Arm NEON with dot products (Armv8.2): 16 products per instruction.
#include "neon.h"

namespace mobilemoe {
namespace {

void pack_strip(const Strip& strip, int num_rows, uint8_t* panel, int64_t group_stride) {
  for (int g = 0; g < strip.num_groups; ++g) {
    for (int k = 0; k < num_rows; k += kCellBytes) {
      const uint8x16x4_t cells = transpose_rows(strip.rows + k * strip.stride + g * 16, strip.stride);
      auto* target = reinterpret_cast<int8_t*>(panel) + g * group_stride + k * kGroup;
      for (int i = 0; i < 4; ++i) {
        vst1q_s8(target + 16 * i, low_nibbles(cells.val[i]));
        vst1q_s8(target + 64 + 16 * i, high_nibbles(cells.val[i]));
      }
    }
  }
}

// 16 outputs of kTokens tokens: their sums fill half of the registers.
template <int kTokens>
void multiply_tile(const uint8_t* panel, int num_rows, const Activations* activations, int lane, bool accumulate,
                   float* out, int64_t out_stride) {
  for (int half = 0; half < 2; ++half) {
    int32x4_t sums[kTokens][4];
    for (int t = 0; t < kTokens; ++t) {
      for (int i = 0; i < 4; ++i) sums[t][i] = vdupq_n_s32(activations[t].offset[lane]);
    }
    for (int k = 0; k < num_rows; k += 16) {
      int8x16_t x[kTokens];
      for (int t = 0; t < kTokens; ++t) {
        x[t] = vreinterpretq_s8_s32(vld1q_s32(activations[t].cells[k / 16][lane]));
      }
      const auto* cells = reinterpret_cast<const int8_t*>(panel) + k * kGroup + half * 64;
      for (int i = 0; i < 4; ++i) {
        const int8x16_t c0 = vld1q_s8(cells + 16 * i), c1 = vld1q_s8(cells + 128 + 16 * i);
        const int8x16_t c2 = vld1q_s8(cells + 256 + 16 * i), c3 = vld1q_s8(cells + 384 + 16 * i);
        for (int t = 0; t < kTokens; ++t) {
          sums[t][i] = add_products<0>(sums[t][i], c0, x[t]);
          sums[t][i] = add_products<1>(sums[t][i], c1, x[t]);
          sums[t][i] = add_products<2>(sums[t][i], c2, x[t]);
          sums[t][i] = add_products<3>(sums[t][i], c3, x[t]);
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int i = 0; i < 4; ++i) {
        finish(sums[t][i], activations[t].step[lane], accumulate, out + t * out_stride + half * 16 + 4 * i);
      }
    }
  }
}

void multiply_panel(const uint8_t* panel, int num_rows, const Activations* activations, int lane, int num_tokens,
                    bool accumulate, float* out, int64_t out_stride) {
  constexpr decltype(&multiply_tile<1>) kTiles[] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
                                                    multiply_tile<4>};
  for (int t = 0; t < num_tokens; t += 4) {
    const int count = num_tokens - t < 4 ? num_tokens - t : 4;
    kTiles[count - 1](panel, num_rows, activations + t, lane, accumulate, out + t * out_stride, out_stride);
  }
}

bool supported() { return has_dot_products(); }

}  // namespace

const Isa kNeon = {"neon",
                   supported,
                   8,
                   load_scales,
                   quantize,
                   pack_strip,
                   multiply_panel,
                   multiply_strip,
                   quantize_inputs,
                   multiply_rows,
                   pack_rows,
                   2,
                   multiply_row_panel,
                   router_logits,
                   sigmoid,
                   swiglu,
                   add,
                   in_order,
                   silu_multiply,
                   rms_norm,
                   rotate_and_normalize,
                   attend,
                   merge_row,
                   quantize_head,
                   from_int8,
                   expand_row,
                   from_bf16,
                   to_bf16};

}  // namespace mobilemoe
