// A linear with INT4 weights, groups along its inputs: what the dense operators are made of.
#pragma once

#include <cstring>

#include "errors.h"
#include "isa.h"
#include "mobilemoe.h"
#include "threads.h"
#include "workspace.h"

namespace mobilemoe {

constexpr int64_t kFewTokens = 3;
constexpr int64_t kPassTokens = 1024;
// Weights of a draft come from memory, in one stream for up to so many of its tokens.
constexpr int64_t kStreamTokens = 4;

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
      Layout layout(quantized + t * bytes_per_token);
      inputs[t] = place(layout);
      isa().quantize_inputs(x(t), static_cast<int>(num_groups), inputs[t]);
    }
  }

 private:
  LinearInputs place(Layout& layout) const {
    LinearInputs of;
    of.integers = layout.take<int8_t>(num_groups * kGroup);
    of.step = layout.take<float>(num_groups);
    of.offset = layout.take<int32_t>(num_groups);
    return of;
  }
};

// Tokens times one matrix. A unit is some of its outputs.
struct Product {
  const Tokens& tokens;
  const uint8_t* tiles;
  int64_t num_rows, columns_per_unit;  // a column: tiles of 32 outputs

  Product(const Tokens& of, const mobilemoe_matrix& matrix)
      : tokens(of),
        tiles(matrix.tiles),
        num_rows(matrix.out_features),
        columns_per_unit(of.is_few() ? ceil_div(kUnitBytes, column_bytes()) : 1) {}

  int64_t column_bytes() const { return tokens.num_groups * kGroup * kInputBytes; }
  int64_t num_columns() const { return ceil_div(num_rows, kGroup); }
  int64_t num_units() const { return ceil_div(num_columns(), columns_per_unit); }

  // Hands finish(t, row, values, count) the products of every token with the unit's rows, up to 32 at a time.
  template <typename Finish>
  void run(int64_t unit, const Finish& finish) const {
    alignas(64) float out[kTileTokens * kGroup];
    const int64_t most = isa().linear_tokens;
    const int64_t at_once = tokens.count <= kDraftTokens ? smaller(kStreamTokens, most) : most;
    const int64_t num_passes = ceil_div(tokens.count, at_once);
    for (int64_t column = unit * columns_per_unit; column < smaller((unit + 1) * columns_per_unit, num_columns());
         ++column) {
      const int64_t row = column * kGroup, count = smaller(kGroup, num_rows - row);
      for (int64_t pass = 0; pass < num_passes; ++pass) {
        const int64_t begin = pass * tokens.count / num_passes, end = (pass + 1) * tokens.count / num_passes;
        isa().multiply_rows(tiles + column * column_bytes(), static_cast<int>(tokens.num_groups),
                            tokens.inputs + begin, static_cast<int>(end - begin), out);
        for (int64_t t = begin; t < end; ++t) finish(t, row, out + (t - begin) * kGroup, count);
      }
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
