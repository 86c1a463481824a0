// Plain C++: the reading of the format that the other paths are tested against.
#include "vectors.h"

namespace mobilemoe {
namespace {

void load_scales(const ChunkScales& chunk, int num_rows, float* scales) {
  for (int k = 0; k < num_rows; ++k) {
    float* low = scales + k / 4 * (4 * kChunkGroups) + k % 4;
    float* high = low + 4 * kStripGroups;
    for (int g = 0; g < kStripGroups; ++g) {
      low[4 * g] = g < chunk.num_low ? half_to_float(chunk.low[k * chunk.stride + g]) : 0.0f;
      high[4 * g] = g < chunk.num_high ? half_to_float(chunk.high[k * chunk.stride + g]) : 0.0f;
    }
  }
}

void pack_strip(const Strip& strip, int num_rows, uint8_t* panel, int64_t group_stride) {
  for (int g = 0; g < strip.num_groups; ++g) {
    for (int k = 0; k < num_rows; ++k) {
      const uint8_t* bytes = strip.rows + k * strip.stride + g * 16;
      uint8_t* cells = panel + g * group_stride + k / kCellBytes * (kGroup * kCellBytes) + k % kCellBytes;
      for (int j = 0; j < 16; ++j) {
        // The flipped top bit turns two's complement -8..7 into 0..15.
        cells[j * kCellBytes] = (bytes[j] & 0x0F) ^ kBias;
        cells[(16 + j) * kCellBytes] = (bytes[j] >> 4) ^ kBias;
      }
    }
  }
}

void multiply_panel(const uint8_t* panel, int num_rows, const Activations* activations, int lane, int num_tokens,
                    bool accumulate, float* out, int64_t out_stride) {
  for (int t = 0; t < num_tokens; ++t) {
    const Activations& a = activations[t];
    int32_t sums[kGroup];
    for (int n = 0; n < kGroup; ++n) sums[n] = a.offset[lane];
    for (int c = 0; c < num_rows / kCellBytes; ++c) {
      int8_t x[kCellBytes];
      std::memcpy(x, &a.cells[c / 4][lane][c % 4], kCellBytes);
      const uint8_t* cells = panel + c * kGroup * kCellBytes;
      for (int n = 0; n < kGroup; ++n) {
        for (int j = 0; j < kCellBytes; ++j) sums[n] += cells[n * kCellBytes + j] * x[j];
      }
    }
    float* row = out + t * out_stride;
    for (int n = 0; n < kGroup; ++n) {
      const float value = static_cast<float>(sums[n]) * a.step[lane];
      row[n] = accumulate ? row[n] + value : value;
    }
  }
}

void multiply_strip(const Strip& strip, int num_rows, const Activations& activations, int first_lane, const uint8_t*,
                    float* out) {
  uint8_t panel[kBlock * kGroup];
  for (int g = 0; g < strip.num_groups; ++g) {
    pack_strip({strip.rows + g * 16, strip.stride, 1}, num_rows, panel, 0);
    multiply_panel(panel, num_rows, &activations, first_lane + g, 1, false, out + g * kGroup, 0);
  }
}

void multiply_rows(const uint8_t* qweight, const uint16_t* scale, int num_rows, int num_groups,
                   const LinearInputs& inputs, float* out) {
  for (int n = 0; n < num_rows; ++n) {
    float sums[kSums] = {};
    for (int g = 0; g < num_groups; ++g) {
      const uint8_t* bytes = qweight + (n * num_groups + g) * 16;
      const int8_t *even = inputs.even + g * 16, *odd = inputs.odd + g * 16;
      const int32_t* offset = inputs.offset + 4 * g;
      int32_t sum = offset[0] + offset[1] + offset[2] + offset[3];
      for (int j = 0; j < kGroup / 2; ++j) {
        sum += ((bytes[j] & 0x0F) ^ kBias) * even[j] + ((bytes[j] >> 4) ^ kBias) * odd[j];
      }
      sums[g % kSums] += static_cast<float>(sum) * (half_to_float(scale[n * num_groups + g]) * inputs.step[g]);
    }
    out[n] = ((sums[0] + sums[1]) + sums[2]) + sums[3];
  }
}

void multiply_row_panel(const uint8_t* panel, const float* scales, int num_groups, const LinearInputs* inputs,
                        int num_tokens, float* out) {
  for (int t = 0; t < num_tokens; ++t) {
    float* row = out + t * kPanelRows;
    for (int first = 0; first < kSums; ++first) {
      float sums[kPanelRows] = {};
      for (int g = first; g < num_groups; g += kSums) {
        const int32_t* offset = inputs[t].offset + 4 * g;
        const float step = inputs[t].step[g];
        for (int n = 0; n < kPanelRows; ++n) {
          int32_t sum = offset[0] + offset[1] + offset[2] + offset[3];
          for (int c = 0; c < 8; ++c) {
            const uint8_t* cell = panel + ((g * 8 + c) * kPanelRows + n) * kCellBytes;
            const int8_t* x = (c % 2 == 0 ? inputs[t].even : inputs[t].odd) + g * 16 + c / 2 * kCellBytes;
            for (int j = 0; j < kCellBytes; ++j) sum += cell[j] * x[j];
          }
          sums[n] += static_cast<float>(sum) * (scales[g * kPanelRows + n] * step);
        }
      }
      for (int n = 0; n < kPanelRows; ++n) row[n] = first > 0 ? row[n] + sums[n] : sums[n];
    }
  }
}

bool supported() { return true; }

}  // namespace

const Isa kPortable = {"portable",
                       supported,
                       4,
                       load_scales,
                       quantize,
                       pack_strip,
                       multiply_panel,
                       multiply_strip,
                       quantize_inputs,
                       multiply_rows,
                       pack_rows,
                       4,
                       multiply_row_panel,
                       router_logits,
                       sigmoid,
                       swiglu,
                       add,
                       in_order,
                       silu_multiply,
                       rms_norm,
                       rotate_and_normalize,
                       transpose_keys,
                       attend,
                       expand_row,
                       from_bf16,
                       to_bf16};

}  // namespace mobilemoe
