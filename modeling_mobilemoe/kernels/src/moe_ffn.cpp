// The operator: route, gather, gate and up, SwiGLU, down, weighted sum. T tokens, D dim, F expert_dim, E experts, and
// P pairs of a token and one of its experts, T * top_k. few_tokens.cpp and many_tokens.cpp are two ways through the
// same arithmetic, with the same bits out.
#include <cstring>
#include <initializer_list>

#include "errors.h"
#include "experts.h"
#include "mobilemoe.h"
#include "threads.h"

namespace mobilemoe {
namespace {

// Up to here most pairs have an expert of their own, and its weights come from memory.
constexpr int64_t kFewTokens = 4;
// Tokens taken through all steps at a time, which bounds the workspace.
constexpr int64_t kPassTokens = 1024;
struct Width {
  const char* name;
  int64_t value;
};

constexpr int64_t kMaxWidth = 1 << 20, kMaxExperts = 1 << 16, kMaxTokens = int64_t{1} << 40;

}  // namespace

int check_moe_ffn(const mobilemoe_moe_ffn_args& a) {
  if (a.num_tokens < 0 || a.num_tokens > kMaxTokens) return fail("num_tokens=%lld", (long long)a.num_tokens);
  for (const auto& [name, width] : {Width{"dim", a.dim}, Width{"expert_dim", a.expert_dim}}) {
    if (width < kGroup || width > kMaxWidth || width % kGroup != 0) {
      return fail("%s=%lld is not a multiple of %d between %d and %lld", name, (long long)width, kGroup, kGroup,
                  (long long)kMaxWidth);
    }
  }
  if (a.num_experts < 1 || a.num_experts > kMaxExperts) return fail("num_experts=%lld", (long long)a.num_experts);
  if (a.top_k < 1 || a.top_k > a.num_experts) {
    return fail("top_k=%lld does not fit %lld experts", (long long)a.top_k, (long long)a.num_experts);
  }
  if ((a.top_k_index == nullptr) != (a.top_k_weights == nullptr)) {
    return fail("top_k_index and top_k_weights go together");
  }
  if ((a.top_k_index == nullptr) == (a.router == nullptr))
    return fail("exactly one of router and top_k_index is needed");
  for (const int32_t dtype : {a.dtype, a.weights_dtype}) {
    if (dtype != MOBILEMOE_FP32 && dtype != MOBILEMOE_BF16) return fail("dtype=%d is neither FP32 nor BF16", dtype);
  }
  if (a.num_tokens > 0 && a.x == nullptr) return fail("x is null");
  if (a.top_k_index != nullptr) {
    for (int64_t i = 0; i < a.num_tokens * a.top_k; ++i) {
      if (a.top_k_index[i] < 0 || a.top_k_index[i] >= a.num_experts) {
        return fail("top_k_index[%lld]=%lld is not one of %lld experts", (long long)i, (long long)a.top_k_index[i],
                    (long long)a.num_experts);
      }
    }
  }
  return MOBILEMOE_OK;
}

}  // namespace mobilemoe

int mobilemoe_moe_ffn(const mobilemoe_moe_ffn_args* args, int64_t num_threads) {
  using namespace mobilemoe;
  if (args == nullptr) return fail("args is null");
  if (const int status = check_moe_ffn(*args)) return status;
  if (const int status = check_threads(num_threads)) return status;
  if (args->num_tokens == 0) return MOBILEMOE_OK;
  if (args->gate_up == nullptr || args->down == nullptr || args->out == nullptr) {
    return fail("an expert weight or out is null");
  }
  const Problem problem(*args, num_threads);
  const int64_t num_passes = ceil_div(args->num_tokens, kPassTokens);
  for (int64_t pass = 0; pass < num_passes; ++pass) {
    const int64_t first = pass * args->num_tokens / num_passes;
    const int64_t count = (pass + 1) * args->num_tokens / num_passes - first;
    const int status =
        count <= kFewTokens ? run_few_tokens(problem, first, count) : run_many_tokens(problem, first, count);
    if (status != MOBILEMOE_OK) return status;
  }
  return MOBILEMOE_OK;
}

int mobilemoe_route(const mobilemoe_moe_ffn_args* args, int64_t* index, float* weight, int64_t num_threads) {
  using namespace mobilemoe;
  if (args == nullptr) return fail("args is null");
  if (const int status = check_moe_ffn(*args)) return status;
  if (const int status = check_threads(num_threads)) return status;
  if (args->num_tokens == 0) return MOBILEMOE_OK;
  if (index == nullptr || weight == nullptr) return fail("index or weight is null");
  const Problem problem(*args, num_threads);
  const auto place = [&](Layout& layout) { return Pass(layout, problem, 0, args->num_tokens); };
  Layout measured;
  place(measured);
  char* memory = workspace().reserve(measured.size());
  if (memory == nullptr) return out_of_memory(measured.size());
  Layout placed(memory);
  const Pass pass = place(placed);
  auto scored = pass.score(pass.inputs());
  auto chosen = pass.choose();
  run_phases(num_threads, scored, chosen);
  std::memcpy(index, pass.router.index, args->num_tokens * args->top_k * sizeof(int64_t));
  std::memcpy(weight, pass.router.weight, args->num_tokens * args->top_k * sizeof(float));
  return MOBILEMOE_OK;
}
