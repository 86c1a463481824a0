// Few tokens: memory is the limit. A unit is a block of rows of one pair's expert, a contiguous piece of the weights
// that is read once, while the next one is fetched.
#include <cstring>

#include "experts.h"

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
  for (int64_t line = first; line < last; ++line) __builtin_prefetch(static_cast<const char*>(weights) + line * 64);
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

struct FewTokens : Pass {
  float* gate_up;  // [P, blocks of D, 2F]
  float* down;     // [P, blocks of F, D]
  float* sums;     // [threads, 3, D]

  FewTokens(Layout& layout, const Problem& of, int64_t at, int64_t count)
      : Pass(layout, of, at, count),
        gate_up(layout.take<float>(count * of.args.top_k * of.gate_up.num_blocks() * of.gate_up.columns)),
        down(layout.take<float>(count * of.args.top_k * of.down.num_blocks() * of.down.columns)),
        sums(layout.take<float>(of.num_threads * 3 * of.args.dim)) {}

  void run() const {
    const mobilemoe_moe_ffn_args& args = problem.args;
    const Experts &in = problem.gate_up, &out = problem.down;
    const int64_t num_pairs = num_tokens * args.top_k, dim = args.dim;
    const float* x = inputs();
    auto scored = score(x);
    auto chosen = choose();
    // Pairs by expert, so that a second token of an expert finds its weights in cache.
    const auto block_of = [&](const Experts& experts, int64_t unit) {
      return Block{router.index[router.sorted[unit / experts.num_blocks()]], unit % experts.num_blocks()};
    };
    const int64_t num_in = num_pairs * in.num_blocks(), num_out = num_pairs * out.num_blocks();
    const auto first_half = [&](int64_t unit, int64_t next, int64_t worker) {
      const int64_t pair = router.sorted[unit / in.num_blocks()], block = unit % in.num_blocks();
      // The worker's last block fetches the one of the other matrix that it will likely begin with.
      const Weights ahead =
          next < num_in ? block_of(in, next).weights(in) : block_of(out, smaller(worker, num_out - 1)).weights(out);
      multiply_block(in, block_of(in, unit), ahead, x + pair / args.top_k * dim + block * kBlock,
                     gate_up + (pair * in.num_blocks() + block) * in.columns);
    };
    const auto second_half = [&](int64_t unit, int64_t next, int64_t) {
      const int64_t pair = router.sorted[unit / out.num_blocks()], block = unit % out.num_blocks();
      const int num_rows = rows_in_block(out.rows, block);
      alignas(64) float gate[kBlock] = {}, up[kBlock] = {}, mid[kBlock];
      for (int64_t b = 0; b < in.num_blocks(); ++b) {
        const float* partial = gate_up + (pair * in.num_blocks() + b) * in.columns + block * kBlock;
        isa().add(gate, partial, 1.0f, num_rows);
        isa().add(up, partial + args.expert_dim, 1.0f, num_rows);
      }
      isa().swiglu(gate, up, num_rows, mid);
      multiply_block(out, block_of(out, unit), block_of(out, next < num_out ? next : unit).weights(out), mid,
                     down + (pair * out.num_blocks() + block) * dim);
    };
    const auto add_up = [&](int64_t t, int64_t, int64_t worker) {
      float *total = sums + worker * 3 * dim, *of_pair = total + dim, *ordered = total + 2 * dim;
      std::memset(total, 0, dim * sizeof(float));
      for (int64_t pair = t * args.top_k; pair < (t + 1) * args.top_k; ++pair) {
        std::memset(of_pair, 0, dim * sizeof(float));
        for (int64_t b = 0; b < out.num_blocks(); ++b) {
          isa().add(of_pair, down + (pair * out.num_blocks() + b) * dim, 1.0f, dim);
        }
        isa().add(total, of_pair, router.weight[pair], dim);
      }
      write(t, total, ordered);
    };
    Phase gated([num_in] { return num_in; }, first_half);
    Phase multiplied([num_out] { return num_out; }, second_half);
    Phase added([this] { return num_tokens; }, add_up);
    run_phases(problem.num_threads, scored, chosen, gated, multiplied, added);
  }
};

}  // namespace

int run_few_tokens(const Problem& problem, int64_t first, int64_t count) {
  return run_pass<FewTokens>(problem, first, count);
}

}  // namespace mobilemoe
