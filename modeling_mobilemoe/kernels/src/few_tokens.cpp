#include <cstring>

#include "few_tokens.h"

namespace mobilemoe {
namespace {

// Where the weights of a block of rows begin: they are contiguous.
struct Weights {
  const uint8_t* qweight;
  const uint16_t* scale;
};

struct Block {
  int64_t expert, block;

  Weights weights(const Experts& of) const {
    const int64_t row = expert * of.rows + block * kBlock;
    return {of.qweight + row * of.columns / 2, of.scale + row * of.num_groups()};
  }
};

// Asks for lines [first, last) of the weights to come, as many at once as a core can wait for.
void fetch(const void* weights, int64_t first, int64_t last) {
  for (int64_t line = first; line < last; ++line) __builtin_prefetch(static_cast<const char*>(weights) + line * 64, 0, 2);
}

// out [columns] = a block of an expert times its inputs x. Prefetches `next` while it computes: a quarter of what it
// reads itself in three portions around the rounding of inputs, or memory would rest meanwhile, the others in
// `multiply_strip`.
void multiply_block(const Experts& experts, Block at, Weights next, const float* x, float* out) {
  const int num_rows = rows_in_block(experts.rows, at.block);
  const int64_t row = at.block * kBlock;
  fetch(next.scale, 0, ceil_div(num_rows * experts.num_groups() * 2, 64));
  alignas(64) float scales[kBlock * kChunkGroups];
  Activations activations;
  const int64_t early = num_rows / 2, by_strip = num_rows * 3 / 4;  // lines of 64 bytes
  for (int64_t group = 0; group < experts.num_groups(); group += kChunkGroups) {
    const Strip low = experts.strip(at.expert, row, group), high = experts.strip(at.expert, row, group + kStripGroups);
    const uint8_t* ahead = next.qweight + group * num_rows * kGroup / 2;
    fetch(ahead, 0, early / 3);
    isa().load_scales(experts.scales(at.expert, row, low, group, high, group + kStripGroups), num_rows, scales);
    fetch(ahead, early / 3, early * 2 / 3);
    isa().quantize(&x, 1, scales, num_rows, &activations);
    fetch(ahead, early * 2 / 3, early);
    ahead += early * 64;
    isa().multiply_strip(low, num_rows, activations, 0, ahead, out + group * kGroup);
    if (high.num_groups > 0) {
      ahead += by_strip * 64;
      isa().multiply_strip(high, num_rows, activations, kStripGroups, ahead, out + group * kGroup + kStrip);
    }
  }
}

// Pairs by expert, so that a second token of an expert finds its weights in cache.
Block block_of(const Router& router, const Experts& experts, int64_t unit) {
  return {router.index[router.sorted[unit / experts.num_blocks()]], unit % experts.num_blocks()};
}

}  // namespace

void FewTokens::multiply_in(int64_t unit, int64_t next, int64_t worker, const float* x) const {
  const Experts &in = problem.gate_up, &out = problem.down;
  const int64_t pair = router.sorted[unit / in.num_blocks()], block = unit % in.num_blocks();
  // The worker's last block fetches the one of the other matrix that it will likely begin with.
  const int64_t first_out = smaller(first_unit(worker, num_out(), problem.num_threads), num_out() - 1);
  const Weights ahead =
      next < num_in() ? block_of(router, in, next).weights(in) : block_of(router, out, first_out).weights(out);
  multiply_block(in, block_of(router, in, unit), ahead, x + pair / problem.args.top_k * problem.args.dim + block * kBlock,
                 gate_up + (pair * in.num_blocks() + block) * in.columns);
}

void FewTokens::multiply_out(int64_t unit, int64_t next) const {
  const Experts &in = problem.gate_up, &out = problem.down;
  const int64_t pair = router.sorted[unit / out.num_blocks()], block = unit % out.num_blocks();
  const int num_rows = rows_in_block(out.rows, block);
  alignas(64) float gate[kBlock] = {}, up[kBlock] = {}, mid[kBlock];
  for (int64_t b = 0; b < in.num_blocks(); ++b) {
    const float* partial = gate_up + (pair * in.num_blocks() + b) * in.columns + block * kBlock;
    isa().add(gate, partial, 1.0f, num_rows);
    isa().add(up, partial + problem.args.expert_dim, 1.0f, num_rows);
  }
  isa().swiglu(gate, up, num_rows, mid);
  multiply_block(out, block_of(router, out, unit), block_of(router, out, next < num_out() ? next : unit).weights(out),
                 mid, down + (pair * out.num_blocks() + block) * problem.args.dim);
}

void FewTokens::add_up(int64_t token, float* total, float* scratch) const {
  const int64_t top_k = problem.args.top_k, num_blocks = problem.down.num_blocks(), dim = problem.args.dim;
  std::memset(total, 0, dim * sizeof(float));
  for (int64_t pair = token * top_k; pair < (token + 1) * top_k; ++pair) {
    std::memset(scratch, 0, dim * sizeof(float));
    for (int64_t b = 0; b < num_blocks; ++b) isa().add(scratch, down + (pair * num_blocks + b) * dim, 1.0f, dim);
    isa().add(total, scratch, router.weight[pair], dim);
  }
}

namespace {

struct FewTokensOfOperator : FewTokens {
  using FewTokens::FewTokens;

  void run() const {
    const float* x = inputs();
    const int64_t dim = problem.args.dim;
    auto scored = score(x);
    auto chosen = choose();
    const Phase gated([&] { return num_in(); },
                      [&](int64_t unit, int64_t next, int64_t worker) { multiply_in(unit, next, worker, x); });
    const Phase multiplied([&] { return num_out(); },
                           [&](int64_t unit, int64_t next, int64_t) { multiply_out(unit, next); });
    const Phase added([&] { return num_tokens; },
                      [&](int64_t token, int64_t, int64_t worker) {
                        float* total = sums + worker * 3 * dim;
                        add_up(token, total, total + dim);
                        write(token, total, total + 2 * dim);
                      });
    run_phases(problem.num_threads, scored, chosen, gated, multiplied, added);
  }
};

}  // namespace

int run_few_tokens(const Problem& problem, int64_t first, int64_t count) {
  return run_pass<FewTokensOfOperator>(problem, first, count);
}

}  // namespace mobilemoe
