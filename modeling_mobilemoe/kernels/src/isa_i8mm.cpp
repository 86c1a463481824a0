// Arm NEON with matrix products (Armv8.6, i8mm): 2 tokens by 2 outputs by 8 inputs per instruction. Its panels hold 8
// inputs of an output side by side; with few tokens it is the dot products of neon.h.
#include "neon.h"

namespace mobilemoe {
namespace {

// Cells of two times 4 rows -> 8 inputs of each of 4 outputs.
inline void store_pairs(int8_t* target, int8x16_t first, int8x16_t second) {
  const int32x4_t a = vreinterpretq_s32_s8(first), b = vreinterpretq_s32_s8(second);
  vst1q_s8(target, vreinterpretq_s8_s32(vzip1q_s32(a, b)));
  vst1q_s8(target + 16, vreinterpretq_s8_s32(vzip2q_s32(a, b)));
}

void pack_strip(const Strip& strip, int num_rows, uint8_t* panel, int64_t group_stride) {
  for (int g = 0; g < strip.num_groups; ++g) {
    for (int k = 0; k < num_rows; k += 8) {
      const uint8_t* rows = strip.rows + k * strip.stride + g * 16;
      const uint8x16x4_t first = transpose_rows(rows, strip.stride);
      const uint8x16x4_t second = transpose_rows(rows + 4 * strip.stride, strip.stride);
      auto* target = reinterpret_cast<int8_t*>(panel) + g * group_stride + k * kGroup;
      for (int i = 0; i < 4; ++i) {
        store_pairs(target + 32 * i, low_nibbles(first.val[i]), low_nibbles(second.val[i]));
        store_pairs(target + 128 + 32 * i, high_nibbles(first.val[i]), high_nibbles(second.val[i]));
      }
    }
  }
}

// 16 outputs of kPairs pairs of tokens; an odd last token is its own partner, and its second result is dropped.
template <int kPairs>
void multiply_tile(const uint8_t* panel, int num_rows, const Activations* activations, int lane, int num_tokens,
                   bool accumulate, float* out, int64_t out_stride) {
  const Activations *first[kPairs], *second[kPairs];
  for (int p = 0; p < kPairs; ++p) {
    first[p] = activations + 2 * p;
    second[p] = 2 * p + 1 < num_tokens ? first[p] + 1 : first[p];
  }
  for (int half = 0; half < 2; ++half) {
    int32x4_t sums[kPairs][8];
    for (int p = 0; p < kPairs; ++p) {
      const int32x4_t offset = vcombine_s32(vdup_n_s32(first[p]->offset[lane]), vdup_n_s32(second[p]->offset[lane]));
      for (int i = 0; i < 8; ++i) sums[p][i] = offset;
    }
    for (int k = 0; k < num_rows; k += 8) {
      int8x16_t x[kPairs];
      for (int p = 0; p < kPairs; ++p) {
        const int at = k / 4 % 4;
        x[p] = vreinterpretq_s8_s32(
            vcombine_s32(vld1_s32(first[p]->cells[k / 16][lane] + at), vld1_s32(second[p]->cells[k / 16][lane] + at)));
      }
      const auto* cells = reinterpret_cast<const int8_t*>(panel) + k * kGroup + half * 128;
      for (int i = 0; i < 8; ++i) {
        const int8x16_t outputs = vld1q_s8(cells + 16 * i);
        for (int p = 0; p < kPairs; ++p) sums[p][i] = vmmlaq_s32(sums[p][i], x[p], outputs);
      }
    }
    for (int p = 0; p < kPairs; ++p) {
      float* target = out + 2 * p * out_stride + half * 16;
      for (int i = 0; i < 4; ++i) {
        const int64x2_t a = vreinterpretq_s64_s32(sums[p][2 * i]), b = vreinterpretq_s64_s32(sums[p][2 * i + 1]);
        finish(vreinterpretq_s32_s64(vzip1q_s64(a, b)), first[p]->step[lane], accumulate, target + 4 * i);
        if (2 * p + 1 < num_tokens) {
          finish(vreinterpretq_s32_s64(vzip2q_s64(a, b)), second[p]->step[lane], accumulate,
                 target + out_stride + 4 * i);
        }
      }
    }
  }
}

void multiply_panel(const uint8_t* panel, int num_rows, const Activations* activations, int lane, int num_tokens,
                    bool accumulate, float* out, int64_t out_stride) {
  for (int t = 0; t < num_tokens; t += 4) {
    const int count = num_tokens - t < 4 ? num_tokens - t : 4;
    const auto multiply = count > 2 ? multiply_tile<2> : multiply_tile<1>;
    multiply(panel, num_rows, activations + t, lane, count, accumulate, out + t * out_stride, out_stride);
  }
}

bool supported() { return has_dot_products() && has_matrix_products(); }

}  // namespace

const Isa kI8mm = {"i8mm",
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
