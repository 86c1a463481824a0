// The experts' weights, and what both ways through the operator share.
#pragma once

#include <cstdint>
#include <cstring>

#include "errors.h"
#include "isa.h"
#include "mobilemoe.h"
#include "routing.h"
#include "threads.h"
#include "workspace.h"

namespace mobilemoe {

// Matrices [E, inputs, outputs]. A column: the tiles of 32 outputs of one expert.
struct Experts {
  const uint8_t* tiles;
  int64_t inputs, outputs;

  int64_t num_columns() const { return outputs / kGroup; }

  // out [num_tokens, 32] = x[t] [inputs] times a column, for up to `expert_tokens` tokens.
  void multiply(int64_t expert, int64_t column, const float* const* x, int num_tokens, float* out) const {
    TileInputs of_tile[kTileTokens];
    const float* rows[kTileTokens];
    const uint8_t* tile = tiles + (expert * num_columns() + column) * inputs * kInputBytes;
    for (int64_t first = 0; first < inputs; first += kBlock) {
      const int count = static_cast<int>(smaller(inputs - first, kBlock));
      for (int t = 0; t < num_tokens; ++t) rows[t] = x[t] + first;
      isa().quantize(rows, num_tokens, reinterpret_cast<const uint16_t*>(tile), count, of_tile);
      isa().multiply_tile(tile + 2 * count, count, of_tile, num_tokens, first > 0, out, kGroup);
      tile += count * kInputBytes;
    }
  }
};

struct Problem {
  const mobilemoe_moe_ffn_args& args;
  int64_t num_threads;
  Experts gate_up, down;

  Problem(const mobilemoe_moe_ffn_args& a, int64_t threads)
      : args(a),
        num_threads(threads),
        gate_up{a.gate_up, a.dim, 2 * a.expert_dim},
        down{a.down, a.expert_dim, a.dim} {}

  // mid [num_tokens, 32] = SwiGLU of 32 gates and ups, which are neighbouring columns.
  void multiply_gate_up(int64_t expert, int64_t column, const float* const* x, int num_tokens, float* mid) const {
    alignas(64) float up[kTileTokens * kGroup];
    gate_up.multiply(expert, 2 * column, x, num_tokens, mid);
    gate_up.multiply(expert, 2 * column + 1, x, num_tokens, up);
    isa().silu_multiply(mid, up, num_tokens * kGroup);
  }
};

// Memory of one pass over up to kPassTokens tokens.
struct Pass {
  const Problem& problem;
  int64_t first, num_tokens;  // of the whole input
  Router router;
  float* converted;  // [T, D] when x is not FP32

  Pass(Layout& layout, const Problem& of, int64_t at, int64_t count)
      : problem(of),
        first(at),
        num_tokens(count),
        router(layout, of.args, at, count, of.num_threads),
        converted(layout.take<float>(of.args.dtype == MOBILEMOE_FP32 ? 0 : count * of.args.dim)) {}

  // x of this pass in FP32.
  const float* inputs() const {
    const int64_t offset = first * problem.args.dim;
    if (problem.args.dtype == MOBILEMOE_FP32) return static_cast<const float*>(problem.args.x) + offset;
    isa().from_bf16(static_cast<const uint16_t*>(problem.args.x) + offset, num_tokens * problem.args.dim, converted);
    return converted;
  }

  // The first two phases: scores, then the choice and the sort.
  auto score(const float* x) const {
    return Phase([this] { return router.num_units(); }, [this, x](int64_t unit, int64_t) { router.run(unit, x); });
  }
  auto choose() const {
    return Phase([] { return int64_t{1}; }, [this](int64_t, int64_t) { router.finish(); });
  }

  // Some outputs of token t, from `column` on.
  void write(int64_t t, int64_t column, const float* values, int64_t count) const {
    const int64_t offset = (first + t) * problem.args.dim + column;
    if (problem.args.dtype == MOBILEMOE_FP32) {
      std::memcpy(static_cast<float*>(problem.args.out) + offset, values, count * sizeof(float));
    } else {
      isa().to_bf16(values, count, static_cast<uint16_t*>(problem.args.out) + offset);
    }
  }
};

// A status with a sentence, as errors.h.
int check_moe_ffn(const mobilemoe_moe_ffn_args& args);

// Runs a pass of either kind in the caller's workspace.
template <typename Kind>
int run_pass(const Problem& problem, int64_t first, int64_t count) {
  Layout measured;
  Kind(measured, problem, first, count);
  char* memory = workspace().reserve(measured.size());
  if (memory == nullptr) return out_of_memory(measured.size());
  Layout placed(memory);
  Kind(placed, problem, first, count).run();
  return MOBILEMOE_OK;
}

// The two kinds, of tokens [first, first + count).
int run_few_tokens(const Problem& problem, int64_t first, int64_t count);
int run_many_tokens(const Problem& problem, int64_t first, int64_t count);

}  // namespace mobilemoe
