// Attention of a few rows over one block of a head's cache, for vectors.h, whose arithmetic it continues.
//
// A row is a query of one token and head. Lanes are keys or channels, so no sum runs across them but that of the
// probabilities.
#pragma once

namespace mobilemoe {
namespace {

// Rows at once: as many as the registers hold.
#if defined(__AVX512F__)
constexpr int kAttendRows = 4;
#else
constexpr int kAttendRows = 2;
#endif

// dots [num_rows, kKeys] = the rows' integers times cells [head_dim / 4, kKeys, 4]; at most kAttendRows rows. Each
// instruction set has its own.
void multiply_keys(const int8_t* cells, const AttentionRow* rows, int num_rows, int64_t head_dim, int32_t* dots);

// products [num_rows, kChannels] = probabilities of 0 to 127 times cells [kKeys / 4, head_dim, 4], of `count` channels
// from `first` on, a multiple of 16. Keys from num_keys on have probability 0.
constexpr int kChannels = 64;
void multiply_values(const int8_t* cells, const int8_t (*probabilities)[kKeys], int num_rows, int num_keys,
                     int64_t head_dim, int64_t first, int count, int32_t (*products)[kChannels]);

inline f32 repeat_value(float value) { return f32{} + value; }

template <int kRows>
inline void score_floats(const AttentionRow* rows, const float* keys, int64_t head_dim, float scale,
                         float (*scores)[kKeys]) {
  constexpr int kVectors = kLanes == 4 ? 4 : 2;
  for (int j = 0; j < kKeys; j += kVectors * kLanes) {
    f32 sums[kRows][kVectors] = {};
    for (int64_t d = 0; d < head_dim; ++d) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const f32 key = load<f32>(keys + d * kKeys + j + v * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[r][v] += key * rows[r].query[d];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) store(scores[r] + j + v * kLanes, sums[r][v] * scale);
    }
  }
}

template <int kRows>
inline void score_integers(const AttentionRow* rows, const CachedBlock& block, int64_t head_dim, float scale,
                           float (*scores)[kKeys]) {
  alignas(64) int32_t dots[kRows][kKeys];
  multiply_keys(block.key_cells, rows, kRows, head_dim, dots[0]);
  for (int r = 0; r < kRows; ++r) {
    const float step = rows[r].step * scale;
    for (int j = 0; j < kKeys; ++j) scores[r][j] = static_cast<float>(dots[r][j]) * (block.key_steps[j] * step);
  }
}

// sums [rows][kVectors * kLanes] = themselves times `scale`, plus the rows' probabilities times values.
template <int kRows, int kVectors>
inline void add_values(const AttentionRow* rows, const float (*probabilities)[kKeys], const float* scale,
                       const float* values, int64_t head_dim, int64_t d) {
  f32 sums[kRows][kVectors];
  int common = kKeys;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = load<f32>(rows[r].sums + d + v * kLanes) * scale[r];
    common = rows[r].num_keys < common ? rows[r].num_keys : common;
  }
  for (int j = 0; j < common; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const f32 value = load<f32>(values + j * head_dim + d + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r][v] += value * probabilities[r][j];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    // Later tokens see more; a bad value among those must not reach this row, not even times zero.
    for (int j = common; j < rows[r].num_keys; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] += load<f32>(values + j * head_dim + d + v * kLanes) * probabilities[r][j];
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(rows[r].sums + d + v * kLanes, sums[r][v]);
  }
}

// The same with values in INT8: the products of probabilities and steps are rounded to integers with one step for the
// block. What is not finite makes it NaN.
template <int kRows>
inline void add_integer_values(const AttentionRow* rows, const float (*probabilities)[kKeys], const float* scale,
                               const CachedBlock& block, int64_t head_dim) {
  alignas(64) int8_t integers[kRows][kKeys];
  float step[kRows];
  int num_keys = 0;
  for (int r = 0; r < kRows; ++r) {
    num_keys = rows[r].num_keys > num_keys ? rows[r].num_keys : num_keys;
    alignas(64) float weights[kKeys];
    for (int j = 0; j < kKeys; j += kLanes) {
      store(weights + j, load<f32>(probabilities[r] + j) * load<f32>(block.value_steps + j));
    }
    // Whatever the steps of keys are that the row does not see.
    for (int j = rows[r].num_keys; j < kKeys; ++j) weights[j] = 0.0f;
    step[r] = round_to_int8(weights, kKeys, integers[r]).step;
  }
  for (int64_t first = 0; first < head_dim; first += kChannels) {
    const int count = static_cast<int>(head_dim - first < kChannels ? head_dim - first : kChannels);
    alignas(64) int32_t products[kRows][kChannels];
    multiply_values(block.value_cells, integers, kRows, num_keys, head_dim, first, count, products);
    for (int r = 0; r < kRows; ++r) {
      float* sums = rows[r].sums + first;
      for (int d = 0; d < count; ++d) sums[d] = sums[d] * scale[r] + static_cast<float>(products[r][d]) * step[r];
    }
  }
}

template <int kRows>
inline void attend_tile(AttentionRow* rows, const CachedBlock& block, int64_t head_dim, float scale) {
  alignas(64) float scores[kRows][kKeys];
  const bool is_int8 = block.key_cells != nullptr;
  if (is_int8) {
    score_integers<kRows>(rows, block, head_dim, scale, scores);
  } else {
    score_floats<kRows>(rows, block.keys, head_dim, scale, scores);
  }
  // Per row, one lane each: what corrects the sums so far.
  f32 corrections = {};
  f32 offsets[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    for (int j = rows[r].num_keys; j < kKeys; ++j) scores[r][j] = rows[r].largest;
    f32 largest = repeat_value(rows[r].largest);
    // In this order a score that is NaN is left out.
    for (int j = 0; j < kKeys; j += kLanes) largest = larger(load<f32>(scores[r] + j), largest);
    const float offset = largest_lane(largest);
    offsets[r] = repeat_value(offset);
    corrections[r] = rows[r].largest - offset;
    rows[r].largest = offset;
  }
  corrections = exponential(corrections);
  float correction[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    correction[r] = corrections[r];
    for (int j = 0; j < kKeys; j += kLanes) store(scores[r] + j, exponential(load<f32>(scores[r] + j) - offsets[r]));
    for (int j = rows[r].num_keys; j < kKeys; ++j) scores[r][j] = 0.0f;
    f32 total[16 / kLanes] = {};
    for (int j = 0; j < kKeys; j += 16) {
      for (int i = 0; i < 16 / kLanes; ++i) total[i] += load<f32>(scores[r] + j + i * kLanes);
    }
    rows[r].total = rows[r].total * correction[r] + sum_lanes(total);
  }
  if (is_int8) return add_integer_values<kRows>(rows, scores, correction, block, head_dim);
  int64_t d = 0;
  for (; d + 32 <= head_dim; d += 32) {
    add_values<kRows, 32 / kLanes>(rows, scores, correction, block.values, head_dim, d);
  }
  if (d < head_dim) add_values<kRows, 16 / kLanes>(rows, scores, correction, block.values, head_dim, d);
}

inline void attend(AttentionRow* rows, int num_rows, const CachedBlock& block, int64_t head_dim, float scale) {
  int r = 0;
  for (; r + kAttendRows <= num_rows; r += kAttendRows) attend_tile<kAttendRows>(rows + r, block, head_dim, scale);
#if defined(__AVX512F__)
  if (num_rows - r == 3) return attend_tile<3>(rows + r, block, head_dim, scale);
  if (num_rows - r == 2) return attend_tile<2>(rows + r, block, head_dim, scale);
#endif
  if (num_rows - r == 1) attend_tile<1>(rows + r, block, head_dim, scale);
}

inline void merge_row(const AttentionRow& part, AttentionRow* whole, int64_t head_dim) {
  const float largest = part.largest > whole->largest ? part.largest : whole->largest;
  f32 corrections = {whole->largest - largest, part.largest - largest};
  corrections = exponential(corrections);
  const float before = corrections[0], now = corrections[1];
  whole->largest = largest;
  whole->total = whole->total * before + part.total * now;
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    store(whole->sums + d, load<f32>(whole->sums + d) * before + load<f32>(part.sums + d) * now);
  }
}

// x [dim] -> INT8 of -127 to 127. Returns the step, NaN where x is not finite.
inline float quantize_head(const float* x, int64_t dim, int8_t* out) { return round_to_int8(x, dim, out).step; }

}  // namespace
}  // namespace mobilemoe
