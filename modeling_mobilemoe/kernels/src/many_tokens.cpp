// Many tokens: arithmetic is the limit. A unit is an expert, some of its tokens, and a chunk of its outputs, whose
// weights are unpacked once and stay in cache while tiles of tokens pass over them.
#include <cstring>
#include <initializer_list>

#include "experts.h"

namespace mobilemoe {
namespace {

// Tokens of one expert in a unit: enough to pay for unpacking, few enough that one popular expert is shared out.
constexpr int64_t kUnitTokens = 96;
// An expert with no more tokens than this is multiplied from its packed rows.
constexpr int64_t kUnpackTokens = 2;

// Scratch memory of one worker: a chunk of one expert, and one tile of tokens.
struct Worker {
  uint8_t* panel;            // [8 groups, rows, 32]
  float* scales;             // [rows, 8]
  Activations* activations;  // [tile]
  float* sums;               // [tile, 256]

  Worker(Layout& layout, int64_t max_rows)
      : panel(layout.take<uint8_t>(kChunkGroups * kGroup * max_rows)),
        scales(layout.take<float>(kChunkGroups * max_rows)),
        activations(layout.take<Activations>(kMaxTile)),
        sums(layout.take<float>(kMaxTile * 2 * kStrip)) {}
};

// Two strips of one expert: what a unit of the many-token path multiplies.
struct Chunk {
  const Experts& experts;
  int64_t expert, low_group, high_group;
  Strip low, high;

  // Fetches some rows of the weights into the second-level cache.
  void prefetch(int64_t first_row, int64_t num_rows) const {
    for (int64_t row = first_row; row < smaller(first_row + num_rows, experts.rows); ++row) {
      for (const Strip* strip : {&low, &high}) {
        // Both ends: a tensor inside a file need not begin at a cache line.
        __builtin_prefetch(strip->rows + row * strip->stride, 0, 2);
        __builtin_prefetch(strip->rows + row * strip->stride + kStrip / 2 - 1, 0, 2);
      }
    }
  }
};

// Progress of fetching the next chunk while this one is computed, in equal steps.
struct Ahead {
  const Chunk& chunk;
  int64_t rows_per_step, row = 0;

  Ahead(const Chunk& next, int64_t num_steps) : chunk(next), rows_per_step(ceil_div(next.experts.rows, num_steps)) {}

  void step() {
    chunk.prefetch(row, rows_per_step);
    row += rows_per_step;
  }
};

// sums [num_tokens, 256] = rows x[t] [rows] times the chunk: the low strip's 128 outputs, then the high strip's.
void multiply_chunk(const Chunk& chunk, const Worker& worker, bool is_packed, int num_tokens, const float* const* x,
                    Ahead& ahead) {
  constexpr int64_t kStride = 2 * kStrip;
  const int64_t rows = chunk.experts.rows;
  for (int64_t block = 0; block < chunk.experts.num_blocks(); ++block) {
    const int num_rows = rows_in_block(rows, block);
    const int64_t row = block * kBlock;
    const float* inputs[kMaxTile];
    for (int t = 0; t < num_tokens; ++t) inputs[t] = x[t] + row;
    isa().quantize(inputs, num_tokens, worker.scales + row * kChunkGroups, num_rows, worker.activations);
    for (int t = 0; t < num_tokens; ++t) {
      // Rows of tokens lie apart; the start of the next block is near enough to the end of this one.
      for (int k = kBlock; k < 2 * kBlock; k += 16) __builtin_prefetch(inputs[t] + k);
    }
    ahead.step();
    for (int half = 0; half < 2; ++half) {
      const Strip& strip = half == 0 ? chunk.low : chunk.high;
      const int first_lane = half * kStripGroups;
      float* sums = worker.sums + half * kStrip;
      if (is_packed) {
        const Strip at_block = {strip.rows + row * strip.stride, strip.stride, strip.num_groups};
        if (strip.num_groups == 0) continue;
        for (int t = 0; t < num_tokens; ++t) {
          alignas(64) float partial[kStrip];
          float* target = block == 0 ? sums + t * kStride : partial;
          isa().multiply_strip(at_block, num_rows, worker.activations[t], first_lane, at_block.rows, target);
          if (block > 0) isa().add(sums + t * kStride, partial, 1.0f, strip.num_groups * kGroup);
        }
        continue;
      }
      for (int g = 0; g < strip.num_groups; ++g) {
        isa().multiply_panel(worker.panel + ((first_lane + g) * rows + row) * kGroup, num_rows, worker.activations,
                             first_lane + g, num_tokens, block > 0, sums + g * kGroup, kStride);
      }
    }
  }
}

// Multiplies the chunk with `count` tokens, whose inputs are x(i), and hands each token's sums to finish(i, sums).
template <typename Rows, typename Finish>
void multiply_tokens(const Chunk& chunk, const Chunk& next, const Worker& worker, int64_t count, const Rows& x,
                     const Finish& finish) {
  const int64_t rows = chunk.experts.rows;
  isa().load_scales(chunk.experts.scales(chunk.expert, 0, chunk.low, chunk.low_group, chunk.high, chunk.high_group),
                    static_cast<int>(rows), worker.scales);
  const bool is_packed = count <= kUnpackTokens;
  if (!is_packed) {
    isa().pack_strip(chunk.low, static_cast<int>(rows), worker.panel, rows * kGroup);
    if (chunk.high.num_groups > 0) {
      isa().pack_strip(chunk.high, static_cast<int>(rows), worker.panel + kStripGroups * rows * kGroup, rows * kGroup);
    }
  }
  // Tiles of nearly the same size: a last tile of one token would cost as much as several.
  const int64_t num_tiles = ceil_div(count, isa().tile);
  Ahead ahead(next, num_tiles * chunk.experts.num_blocks());
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int64_t first = tile * count / num_tiles, last = (tile + 1) * count / num_tiles;
    const float* inputs[kMaxTile];
    for (int64_t i = first; i < last; ++i) inputs[i - first] = x(i);
    multiply_chunk(chunk, worker, is_packed, static_cast<int>(last - first), inputs, ahead);
    for (int64_t i = first; i < last; ++i) finish(i, worker.sums + (i - first) * 2 * kStrip);
  }
}

struct ManyTokens : Pass {
  float* mid;           // [P, F], in order of the outputs
  float* expert_out;    // [P, D], in accumulator order
  int64_t* unit_start;  // [E + 1]: units of (expert, tokens) before each expert
  float* sums;          // [threads, 2, D]
  char* workers;        // one Worker each
  int64_t worker_bytes;

  ManyTokens(Layout& layout, const Problem& of, int64_t at, int64_t count)
      : Pass(layout, of, at, count),
        mid(layout.take<float>(count * of.args.top_k * of.args.expert_dim)),
        expert_out(layout.take<float>(count * of.args.top_k * of.args.dim)),
        unit_start(layout.take<int64_t>(of.args.num_experts + 1)),
        sums(layout.take<float>(of.num_threads * 2 * of.args.dim)) {
    Layout one;
    Worker(one, max_rows());
    worker_bytes = one.size();
    workers = layout.take<char>(worker_bytes * of.num_threads);
  }

  int64_t max_rows() const {
    return problem.args.dim > problem.args.expert_dim ? problem.args.dim : problem.args.expert_dim;
  }

  Worker worker(int64_t i) const {
    Layout layout(workers + i * worker_bytes);
    return Worker(layout, max_rows());
  }

  // A range of one expert's pairs, as places in `sorted`.
  struct Range {
    int64_t expert, begin, count;
  };

  Range range(int64_t index) const {
    int64_t low = 0, high = problem.args.num_experts;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (unit_start[middle] <= index ? low : high) = middle;
    }
    const int64_t start = router.start[low], count = router.start[low + 1] - start;
    const int64_t num_ranges = unit_start[low + 1] - unit_start[low], i = index - unit_start[low];
    const int64_t begin = start + i * count / num_ranges, end = start + (i + 1) * count / num_ranges;
    return {low, begin, end - begin};
  }

  // The phase that multiplies chunk(expert, c) for c in [0, num_chunks) and all experts with their pairs' inputs:
  // x(place) is a row, finish(place, c, sums) takes its product with a chunk.
  template <typename MakeChunk, typename Rows, typename Finish>
  auto multiply(int64_t num_chunks, MakeChunk chunk, Rows x, Finish finish) const {
    const auto count = [this, num_chunks] { return unit_start[problem.args.num_experts] * num_chunks; };
    return Phase(count, [=](int64_t unit, int64_t next, int64_t worker_index) {
      const Range pairs = range(unit / num_chunks);
      const int64_t c = unit % num_chunks;
      const Chunk now = chunk(pairs.expert, c);
      const Chunk then = next < count() ? chunk(range(next / num_chunks).expert, next % num_chunks) : now;
      multiply_tokens(
          now, then, worker(worker_index), pairs.count, [&](int64_t i) { return x(pairs.begin + i); },
          [&](int64_t i, const float* of_pair) { finish(pairs.begin + i, c, of_pair); });
    });
  }

  void choose_units() const {
    router.finish();
    unit_start[0] = 0;
    for (int64_t e = 0; e < problem.args.num_experts; ++e) {
      unit_start[e + 1] = unit_start[e] + ceil_div(router.start[e + 1] - router.start[e], kUnitTokens);
    }
  }

  void run() const {
    const mobilemoe_moe_ffn_args& args = problem.args;
    const int64_t dim = args.dim, expert_dim = args.expert_dim;
    const float* x = inputs();
    auto scored = score(x);
    Phase chosen([] { return int64_t{1}; }, [this](int64_t, int64_t, int64_t) { choose_units(); });
    const auto strip_width = [](int64_t width, int64_t c) { return smaller(width - c * kStrip, kStrip); };
    // A gate strip and the up strip that belongs to it make a chunk, so that SwiGLU follows while both are in cache.
    auto gated = multiply(
        ceil_div(expert_dim, kStrip),
        [&](int64_t expert, int64_t c) {
          const int64_t group = c * kStripGroups, up_group = expert_dim / kGroup + group;
          Strip gate = problem.gate_up.strip(expert, 0, group), up = problem.gate_up.strip(expert, 0, up_group);
          gate.num_groups = up.num_groups;
          return Chunk{problem.gate_up, expert, group, up_group, gate, up};
        },
        [&](int64_t place) { return x + router.sorted[place] / args.top_k * dim; },
        [&](int64_t place, int64_t c, const float* of_pair) {
          isa().swiglu(of_pair, of_pair + kStrip, strip_width(expert_dim, c), mid + place * expert_dim + c * kStrip);
        });
    auto multiplied = multiply(
        ceil_div(dim, 2 * kStrip),
        [&](int64_t expert, int64_t c) {
          const int64_t group = c * kChunkGroups, high_group = group + kStripGroups;
          return Chunk{problem.down,
                       expert,
                       group,
                       high_group,
                       problem.down.strip(expert, 0, group),
                       problem.down.strip(expert, 0, high_group)};
        },
        [&](int64_t place) { return mid + place * expert_dim; },
        [&](int64_t place, int64_t c, const float* of_pair) {
          // Back at the pair's own place: the weighted sum below needs no inverse of the sort.
          const int64_t column = c * 2 * kStrip;
          std::memcpy(expert_out + router.sorted[place] * dim + column, of_pair,
                      smaller(dim - column, 2 * kStrip) * sizeof(float));
        });
    constexpr int64_t kTokens = 16;
    const auto add_up = [&](int64_t unit, int64_t, int64_t worker_index) {
      float* total = sums + worker_index * 2 * dim;
      for (int64_t t = unit * kTokens; t < smaller((unit + 1) * kTokens, num_tokens); ++t) {
        std::memset(total, 0, dim * sizeof(float));
        for (int64_t pair = t * args.top_k; pair < (t + 1) * args.top_k; ++pair) {
          isa().add(total, expert_out + pair * dim, router.weight[pair], dim);
        }
        write(t, total, total + dim);
      }
    };
    Phase added([this] { return ceil_div(num_tokens, kTokens); }, add_up);
    run_phases(problem.num_threads, scored, chosen, gated, multiplied, added);
  }
};

}  // namespace

int run_many_tokens(const Problem& problem, int64_t first, int64_t count) {
  return run_pass<ManyTokens>(problem, first, count);
}

}  // namespace mobilemoe
