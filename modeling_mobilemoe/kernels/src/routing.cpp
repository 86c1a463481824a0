#include "routing.h"

#include <cmath>
#include <cstring>

#include "isa.h"

namespace mobilemoe {
namespace {

constexpr int64_t kUnitTokens = 16;

// As a sort puts them, descending: NaN is the largest.
bool ranks_before(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

}  // namespace

// Few tokens share out the router's weights among the threads, many tokens share out themselves.
bool Router::is_few() const { return num_tokens < kUnitTokens; }

int64_t Router::num_units() const {
  if (is_given()) return 0;
  return is_few() ? num_threads : (num_tokens + kUnitTokens - 1) / kUnitTokens;
}

void Router::run(int64_t unit, const float* x) const {
  const int64_t num_experts = args.num_experts;
  if (is_few()) {
    const int64_t begin = unit * num_experts / num_threads, end = (unit + 1) * num_experts / num_threads;
    isa().router_logits(x, num_tokens, args.dim, args.router, begin, end, num_experts, logits);
    return;
  }
  const int64_t begin = unit * kUnitTokens;
  const int64_t count = num_tokens - begin < kUnitTokens ? num_tokens - begin : kUnitTokens;
  isa().router_logits(x + begin * args.dim, count, args.dim, args.router, 0, num_experts, num_experts,
                      logits + begin * num_experts);
  for (int64_t token = begin; token < begin + count; ++token) select(token);
}

void Router::finish() const {
  if (is_given()) {
    copy();
  } else if (is_few()) {
    for (int64_t token = 0; token < num_tokens; ++token) select(token);
  }
  sort();
}

// The bias selects, the score weighs; ties go to the lower index.
void Router::select(int64_t token) const {
  float* scores = logits + token * args.num_experts;
  int64_t* chosen = index + token * args.top_k;
  float* share = weight + token * args.top_k;
  isa().sigmoid(scores, args.num_experts);
  float sum = 0.0f;
  for (int64_t slot = 0; slot < args.top_k; ++slot) {
    int64_t best = -1;
    float best_key = 0.0f;
    for (int64_t e = 0; e < args.num_experts; ++e) {
      const float key = args.bias == nullptr ? scores[e] : scores[e] + args.bias[e];
      if (best >= 0 && !ranks_before(key, best_key)) continue;
      bool is_taken = false;
      for (int64_t earlier = 0; earlier < slot; ++earlier) is_taken |= chosen[earlier] == e;
      if (is_taken) continue;
      best = e;
      best_key = key;
    }
    chosen[slot] = best;
    share[slot] = scores[best];
    sum += scores[best];
  }
  for (int64_t slot = 0; slot < args.top_k; ++slot) share[slot] = share[slot] / (sum + 1e-20f) * args.route_scale;
}

void Router::copy() const {
  const int64_t offset = first * args.top_k, num_pairs = num_tokens * args.top_k;
  std::memcpy(index, args.top_k_index + offset, num_pairs * sizeof(int64_t));
  if (args.weights_dtype == MOBILEMOE_BF16) {
    isa().from_bf16(static_cast<const uint16_t*>(args.top_k_weights) + offset, num_pairs, weight);
  } else {
    std::memcpy(weight, static_cast<const float*>(args.top_k_weights) + offset, num_pairs * sizeof(float));
  }
}

// By counting.
void Router::sort() const {
  const int64_t num_pairs = num_tokens * args.top_k, num_experts = args.num_experts;
  std::memset(start, 0, (num_experts + 1) * sizeof(int64_t));
  for (int64_t pair = 0; pair < num_pairs; ++pair) ++start[index[pair] + 1];
  for (int64_t e = 0; e < num_experts; ++e) start[e + 1] += start[e];
  // Placing moves each start to the next expert's, which the shift below undoes.
  for (int64_t pair = 0; pair < num_pairs; ++pair) sorted[start[index[pair]]++] = pair;
  for (int64_t e = num_experts; e > 0; --e) start[e] = start[e - 1];
  start[0] = 0;
  int64_t& num_used = used[num_experts] = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    if (start[e + 1] > start[e]) used[num_used++] = e;
  }
}

}  // namespace mobilemoe
