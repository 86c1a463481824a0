// Plain C++: the reading of the format that the other paths are tested against.
#include "vectors.h"

namespace mobilemoe {
namespace {

inline void from_halves(const uint16_t* halves, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] = half_to_float(halves[i]);
}

void quantize(const float* const* x, int num_tokens, const uint16_t* scales, int num_inputs, TileInputs* inputs) {
  float factors[kBlock], scaled[kBlock];
  from_halves(scales, num_inputs, factors);
  for (int t = 0; t < num_tokens; ++t) {
    for (int k = 0; k < num_inputs; ++k) scaled[k] = x[t][k] * factors[k];
    const Rounded rounded = round_to_int8(scaled, num_inputs, inputs[t].cells);
    inputs[t].step = rounded.step;
    inputs[t].offset = rounded.offset;
  }
}

// The integer of an output and an input of a tile, plus 8.
int integer(const uint8_t* tile, int n, int k) {
  const uint8_t byte = tile[k / kCellBytes * kColumnBytes + n % 16 * kCellBytes + k % kCellBytes];
  return n < 16 ? byte & 15 : byte >> 4;
}

void multiply_tile(const uint8_t* tile, int num_inputs, const TileInputs* inputs, int num_tokens, bool accumulate,
                   float* out, int64_t out_stride) {
  for (int t = 0; t < num_tokens; ++t) {
    for (int n = 0; n < kGroup; ++n) {
      int32_t sum = inputs[t].offset;
      for (int k = 0; k < num_inputs; ++k) sum += integer(tile, n, k) * inputs[t].cells[k];
      const float value = static_cast<float>(sum) * inputs[t].step;
      float& target = out[t * out_stride + n];
      target = accumulate ? target + value : value;
    }
  }
}

void multiply_rows(const uint8_t* tiles, int num_groups, const LinearInputs* inputs, int num_tokens, float* out) {
  for (int t = 0; t < num_tokens; ++t) {
    float sums[kSums][kGroup] = {};
    for (int g = 0; g < num_groups; ++g) {
      const uint8_t* tile = tiles + g * kGroup * kInputBytes;
      float scales[kGroup];
      from_halves(reinterpret_cast<const uint16_t*>(tile + 16 * kGroup), kGroup, scales);
      for (int n = 0; n < kGroup; ++n) {
        int32_t sum = inputs[t].offset[g];
        for (int k = 0; k < kGroup; ++k) sum += integer(tile, n, k) * inputs[t].integers[g * kGroup + k];
        sums[g % kSums][n] += static_cast<float>(sum) * (scales[n] * inputs[t].step[g]);
      }
    }
    for (int n = 0; n < kGroup; ++n) out[t * kGroup + n] = ((sums[0][n] + sums[1][n]) + sums[2][n]) + sums[3][n];
  }
}

void multiply_keys(const int8_t* cells, const AttentionRow* rows, int num_rows, int64_t head_dim, int32_t* dots) {
  for (int r = 0; r < num_rows; ++r) {
    for (int j = 0; j < kKeys; ++j) {
      int32_t sum = 0;
      for (int64_t d = 0; d < head_dim; ++d) {
        sum += cells[(d / kCellBytes * kKeys + j) * kCellBytes + d % kCellBytes] * rows[r].integers[d];
      }
      dots[r * kKeys + j] = sum;
    }
  }
}

void multiply_values(const int8_t* cells, const int8_t (*probabilities)[kKeys], int num_rows, int num_keys,
                     int64_t head_dim, int64_t first, int count, int32_t (*products)[kChannels]) {
  for (int r = 0; r < num_rows; ++r) {
    for (int d = 0; d < count; ++d) {
      int32_t sum = 0;
      for (int j = 0; j < num_keys; ++j) {
        sum += cells[(j / kCellBytes * head_dim + first + d) * kCellBytes + j % kCellBytes] * probabilities[r][j];
      }
      products[r][d] = sum;
    }
  }
}

bool supported() { return true; }

}  // namespace

const Isa kPortable = {
    "portable",    supported,     quantize,      4,          multiply_tile, quantize_inputs, 4,
    multiply_rows, router_logits, sigmoid,       add,        silu_multiply, rms_norm,        rotate_and_normalize,
    attend,        merge_row,     quantize_head, expand_row, from_bf16,     to_bf16};

}  // namespace mobilemoe
