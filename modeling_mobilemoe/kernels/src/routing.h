// Which experts a token goes to, and which tokens an expert gets.
#pragma once

#include <cstdint>

#include "mobilemoe.h"
#include "workspace.h"

namespace mobilemoe {

// Router of some tokens, [first, first + num_tokens) of the whole input, in two steps: units of `run`, then `finish`.
struct Router {
  const mobilemoe_moe_ffn_args& args;
  int64_t first, num_tokens, num_threads;
  float* logits;    // [T, E]
  int64_t* index;   // [T, top_k]
  float* weight;    // [T, top_k]
  int64_t* sorted;  // [T * top_k]: pairs (token, slot) as token * top_k + slot, by expert, then token
  int64_t* start;   // [E + 1]: the pairs of expert e are sorted[start[e]] .. sorted[start[e + 1] - 1]
  int64_t* used;    // [E + 1]: experts that have pairs, and at the end their number

  Router(Layout& layout, const mobilemoe_moe_ffn_args& a, int64_t at, int64_t count, int64_t threads)
      : args(a),
        first(at),
        num_tokens(count),
        num_threads(threads),
        logits(layout.take<float>(count * a.num_experts)),
        index(layout.take<int64_t>(count * a.top_k)),
        weight(layout.take<float>(count * a.top_k)),
        sorted(layout.take<int64_t>(count * a.top_k)),
        start(layout.take<int64_t>(a.num_experts + 1)),
        used(layout.take<int64_t>(a.num_experts + 1)) {}

  int64_t num_units() const;
  // x [T, D] in FP32.
  void run(int64_t unit, const float* x) const;
  void finish() const;

  int64_t num_used() const { return used[args.num_experts]; }

  // Hands work(pairs, count) the pairs of an expert, at most `at_once` of them at a time.
  template <typename Work>
  void for_pairs(int64_t expert, int64_t begin, int64_t end, int at_once, const Work& work) const {
    const int64_t num_pairs = end - begin, num_parts = (num_pairs + at_once - 1) / at_once;
    for (int64_t part = 0; part < num_parts; ++part) {
      const int64_t from = begin + part * num_pairs / num_parts, to = begin + (part + 1) * num_pairs / num_parts;
      work(sorted + start[expert] + from, static_cast<int>(to - from));
    }
  }
  template <typename Work>
  void for_pairs(int64_t expert, int at_once, const Work& work) const {
    for_pairs(expert, 0, start[expert + 1] - start[expert], at_once, work);
  }

 private:
  bool is_given() const { return args.top_k_index != nullptr; }
  bool is_few() const;
  void select(int64_t token) const;
  void copy() const;
  void sort() const;
};

}  // namespace mobilemoe
