// Attention of a few rows over one block of keys, for vectors.h, whose arithmetic it continues.
//
// A row is a query of one token and head. Keys are transposed once for all rows of a block, so that lanes are keys and
// no sum runs across them. Blocks begin at multiples of kKeys from the first position on: a row's result does not
// depend on what it is computed with.
#pragma once

namespace mobilemoe {
namespace {

// Rows at once: as many as the registers hold.
#if defined(__AVX512F__)
constexpr int kAttendRows = 4;
#else
constexpr int kAttendRows = 2;
#endif

inline f32x16 repeat_value(float value) { return f32x16{} + value; }

// keys [num_keys, head_dim], `stride` apart -> out [head_dim, kKeys], zero where there is no key.
inline void transpose_keys(const float* keys, int64_t stride, int num_keys, int64_t head_dim, float* out) {
  for (int j = 0; j < kKeys; j += 16) {
    for (int64_t d = 0; d < head_dim; d += 16) {
      f32x16 tile[16], other[16];
      for (int i = 0; i < 16; ++i) tile[i] = j + i < num_keys ? load<f32x16>(keys + (j + i) * stride + d) : f32x16{};
      // Interleaving registers i and i + 8 four times transposes 16 of them.
      const auto round = [](const f32x16* from, f32x16* to) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          to[2 * i] = __builtin_shufflevector(from[i], from[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                              23);
          to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                                  14, 30, 15, 31);
        }
      };
      round(tile, other);
      round(other, tile);
      round(tile, other);
      round(other, tile);
      for (int i = 0; i < 16; ++i) store(out + (d + i) * kKeys + j, tile[i]);
    }
  }
}

// sums [rows][kVectors * 16] = themselves times `scale`, plus the rows' probabilities times values.
template <int kRows, int kVectors>
inline void add_values(const AttentionRow* rows, const float (*probabilities)[kKeys], const float* scale,
                       const float* values, int64_t stride, int64_t d) {
  f32x16 sums[kRows][kVectors];
  int common = kKeys;
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = load<f32x16>(rows[r].sums + d + 16 * v) * scale[r];
    common = rows[r].num_keys < common ? rows[r].num_keys : common;
  }
  for (int j = 0; j < common; ++j) {
    for (int v = 0; v < kVectors; ++v) {
      const f32x16 value = load<f32x16>(values + j * stride + d + 16 * v);
      for (int r = 0; r < kRows; ++r) sums[r][v] += value * probabilities[r][j];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    // Later tokens see more; a bad value among those must not reach this row, not even times zero.
    for (int j = common; j < rows[r].num_keys; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] += load<f32x16>(values + j * stride + d + 16 * v) * probabilities[r][j];
      }
    }
    for (int v = 0; v < kVectors; ++v) store(rows[r].sums + d + 16 * v, sums[r][v]);
  }
}

template <int kRows>
inline void attend_tile(AttentionRow* rows, const float* keys, const float* values, int64_t value_stride,
                        int64_t head_dim, float scale) {
  alignas(64) float scores[kRows][kKeys];
  for (int j = 0; j < kKeys; j += 32) {
    f32x16 sums[kRows][2] = {};
    for (int64_t d = 0; d < head_dim; ++d) {
      const f32x16 first = load<f32x16>(keys + d * kKeys + j), second = load<f32x16>(keys + d * kKeys + j + 16);
      for (int r = 0; r < kRows; ++r) {
        sums[r][0] += first * rows[r].query[d];
        sums[r][1] += second * rows[r].query[d];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      store(scores[r] + j, sums[r][0] * scale);
      store(scores[r] + j + 16, sums[r][1] * scale);
    }
  }
  const f32x16 places = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  float correction[kRows];
  for (int r = 0; r < kRows; ++r) {
    f32x16 largest = repeat_value(rows[r].largest);
    for (int j = 0; j < kKeys; j += 16) {
      const f32x16 score = load<f32x16>(scores[r] + j);
      const f32x16 seen = places < static_cast<float>(rows[r].num_keys - j) ? score : largest;
      largest = seen > largest ? seen : largest;
    }
    float lanes[16];
    store(lanes, largest);
    for (const float lane : lanes) lanes[0] = lane > lanes[0] ? lane : lanes[0];
    f32x16 total = {};
    for (int j = 0; j < kKeys; j += 16) {
      const f32x16 probability = exponential(load<f32x16>(scores[r] + j) - lanes[0]);
      const f32x16 seen = places < static_cast<float>(rows[r].num_keys - j) ? probability : f32x16{};
      store(scores[r] + j, seen);
      total += seen;
    }
    correction[r] = exponential(repeat_value(rows[r].largest - lanes[0]))[0];
    rows[r].largest = lanes[0];
    rows[r].total = rows[r].total * correction[r] + sum_lanes(total);
  }
  int64_t d = 0;
  for (; d + 32 <= head_dim; d += 32) add_values<kRows, 2>(rows, scores, correction, values, value_stride, d);
  if (d < head_dim) add_values<kRows, 1>(rows, scores, correction, values, value_stride, d);
}

inline void attend(AttentionRow* rows, int num_rows, const float* keys, const float* values, int64_t value_stride,
                   int64_t head_dim, float scale) {
  int r = 0;
  for (; r + kAttendRows <= num_rows; r += kAttendRows) {
    attend_tile<kAttendRows>(rows + r, keys, values, value_stride, head_dim, scale);
  }
  for (; r < num_rows; ++r) attend_tile<1>(rows + r, keys, values, value_stride, head_dim, scale);
}

}  // namespace
}  // namespace mobilemoe
