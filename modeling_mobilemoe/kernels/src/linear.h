// A linear with INT4 weights [N, K], groups along K: what the dense operators are made of.
//
// Few tokens read the weights row by row; many tokens multiply panels of 32 unpacked rows.
#pragma once

#include <cstring>

#include "errors.h"
#include "isa.h"
#include "mobilemoe.h"
#include "workspace.h"

namespace mobilemoe {

constexpr int64_t kFewTokens = 3;
constexpr int64_t kPassTokens = 1024;
// Bytes of weights in a unit of the few-token path, about: ten microseconds, little to lose when a thread is stopped.
constexpr int64_t kUnitBytes = 64 * 1024;
constexpr int64_t kUnitRows = 1024;

// Rows of tokens rounded to INT8.
struct Tokens {
  int64_t count, num_groups;
  LinearInputs* inputs;  // [T]
  char* quantized;       // what they point to
  int64_t bytes_per_token = 0;

  Tokens(Layout& layout, int64_t num_tokens, int64_t width) : count(num_tokens), num_groups(width / kGroup) {
    Layout one;
    place(one);
    bytes_per_token = one.size();
    inputs = layout.take<LinearInputs>(count);
    quantized = layout.take<char>(bytes_per_token * count);
  }

  bool is_few() const { return count <= kFewTokens; }
  // The few tokens' rounding takes less time than a phase of their own.
  int64_t per_unit() const { return is_few() ? count : 8; }
  int64_t num_units() const { return ceil_div(count, per_unit()); }

  // x(t) is the row of token t, in FP32.
  template <typename Rows>
  void quantize(int64_t unit, const Rows& x) const {
    for (int64_t t = unit * per_unit(); t < smaller((unit + 1) * per_unit(), count); ++t) {
      char* memory = quantized + t * bytes_per_token;
      // Zero beyond the last group.
      std::memset(memory, 0, bytes_per_token);
      Layout layout(memory);
      inputs[t] = place(layout);
      isa().quantize_inputs(x(t), static_cast<int>(num_groups), inputs[t]);
    }
  }

 private:
  LinearInputs place(Layout& layout) const {
    const int64_t padded = ceil_div(num_groups, 4) * 4;
    LinearInputs of;
    of.even = layout.take<int8_t>(padded * 16);
    of.odd = layout.take<int8_t>(padded * 16);
    of.step = layout.take<float>(padded);
    of.offset = layout.take<int32_t>(padded * 4);
    return of;
  }
};

// Scratch memory of the workers that multiply.
struct Panels {
  char* memory;
  int64_t bytes, num_groups;

  // Of matrices up to this width.
  Panels(Layout& layout, int64_t num_threads, int64_t width) : num_groups(width / kGroup) {
    Layout one;
    Panel(one, num_groups);
    bytes = one.size();
    memory = layout.take<char>(bytes * num_threads);
  }

  struct Panel {
    uint8_t* cells;  // [K, 32]
    float* scales;   // [groups, 32]
    float* out;      // [tile, 32], or the rows of a unit for one token

    Panel(Layout& layout, int64_t num_groups)
        : cells(layout.take<uint8_t>(num_groups * kGroup * kPanelRows)),
          scales(layout.take<float>(num_groups * kPanelRows)),
          out(layout.take<float>(kUnitRows)) {}
  };

  Panel of(int64_t worker) const {
    Layout layout(memory + worker * bytes);
    return Panel(layout, num_groups);
  }
};

static_assert(kUnitRows >= kMaxLinearTile * kPanelRows, "both kinds of product share their scratch memory");

// Tokens times one matrix, in units of rows.
struct Product {
  const Tokens& tokens;
  const uint8_t* qweight;
  const uint16_t* scale;
  int64_t num_rows, rows_per_unit;

  // `rows_at_once` divides the rows of a unit, but for the last one.
  Product(const Tokens& of, const mobilemoe_matrix& matrix, int64_t num_threads, int64_t rows_at_once = 4)
      : tokens(of), qweight(matrix.qweight), scale(matrix.scale), num_rows(matrix.out_features) {
    rows_per_unit = kPanelRows;
    if (tokens.is_few()) {
      // As many units for each thread, or the last one would leave threads idle.
      const int64_t bytes = num_rows * row_bytes();
      const int64_t units = num_threads * ceil_div(bytes, kUnitBytes * num_threads);
      rows_per_unit = smaller(ceil_div(ceil_div(num_rows, units), rows_at_once) * rows_at_once, kUnitRows);
    }
  }

  int64_t num_units() const { return ceil_div(num_rows, rows_per_unit); }
  int64_t row_bytes() const { return tokens.num_groups * kGroup / 2; }

  // Hands finish(t, row, values, count) the products of every token with the unit's rows.
  template <typename Finish>
  void run(int64_t unit, const Panels::Panel& panel, const Finish& finish) const {
    const int groups = static_cast<int>(tokens.num_groups);
    const int64_t row = unit * rows_per_unit, count = smaller(rows_per_unit, num_rows - row);
    const uint8_t* rows = qweight + row * row_bytes();
    const uint16_t* scales = scale + row * tokens.num_groups;
    if (tokens.is_few()) {
      for (int64_t t = 0; t < tokens.count; ++t) {
        isa().multiply_rows(rows, scales, static_cast<int>(count), groups, tokens.inputs[t], panel.out);
        finish(t, row, panel.out, count);
      }
      return;
    }
    isa().pack_rows(rows, scales, static_cast<int>(count), groups, panel.cells, panel.scales);
    const int64_t num_tiles = ceil_div(tokens.count, isa().linear_tile);
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t begin = tile * tokens.count / num_tiles, end = (tile + 1) * tokens.count / num_tiles;
      isa().multiply_row_panel(panel.cells, panel.scales, groups, tokens.inputs + begin,
                               static_cast<int>(end - begin), panel.out);
      for (int64_t t = begin; t < end; ++t) finish(t, row, panel.out + (t - begin) * kPanelRows, count);
    }
  }
};

// Activations of either type.
struct Rows {
  const void* x;
  int32_t dtype;
  int64_t width;

  // Row t in FP32, converted to `scratch` [width] where it is not.
  const float* in(int64_t t, float* scratch) const {
    if (dtype == MOBILEMOE_FP32) return static_cast<const float*>(x) + t * width;
    isa().from_bf16(static_cast<const uint16_t*>(x) + t * width, width, scratch);
    return scratch;
  }
};

// out[t, row ..] = values [count]
inline void write_rows(void* out, int32_t dtype, int64_t width, int64_t t, int64_t row, const float* values,
                       int64_t count) {
  if (dtype == MOBILEMOE_FP32) {
    std::memcpy(static_cast<float*>(out) + t * width + row, values, count * sizeof(float));
  } else {
    isa().to_bf16(values, count, static_cast<uint16_t*>(out) + t * width + row);
  }
}

constexpr int64_t kMaxWidth = 1 << 24, kMaxTokens = int64_t{1} << 36;

// Statuses with a sentence, as errors.h: of what every dense operator is given, and of one of its matrices.
int check_dense(const char* name, int64_t num_tokens, int64_t width, int32_t dtype, int64_t num_threads);
int check_matrix(const char* name, const mobilemoe_matrix& matrix);

// Runs an operator over its tokens, some at a time, in the caller's workspace.
template <typename Operator, typename Args>
int run_passes(const Args& args, int64_t num_threads) {
  const int64_t num_passes = ceil_div(args.num_tokens, kPassTokens);
  for (int64_t pass = 0; pass < num_passes; ++pass) {
    const int64_t first = pass * args.num_tokens / num_passes;
    const int64_t count = (pass + 1) * args.num_tokens / num_passes - first;
    Layout measured;
    Operator(measured, args, num_threads, first, count);
    char* memory = workspace().reserve(measured.size());
    if (memory == nullptr) return out_of_memory(measured.size());
    Layout placed(memory);
    Operator(placed, args, num_threads, first, count).run();
  }
  return MOBILEMOE_OK;
}

}  // namespace mobilemoe
