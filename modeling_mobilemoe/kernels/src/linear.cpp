// One linear: dense parts of the model, and its head.
#include "linear.h"

#include "errors.h"
#include "threads.h"

namespace mobilemoe {
namespace {

// One pass over up to kPassTokens tokens.
struct Linear {
  const mobilemoe_linear_args& args;
  int64_t num_threads;
  int64_t first;
  Tokens tokens;
  float* converted;  // [threads, K]

  Linear(Layout& layout, const mobilemoe_linear_args& a, int64_t threads, int64_t at, int64_t count)
      : args(a),
        num_threads(threads),
        first(at),
        tokens(layout, count, a.in_features),
        converted(layout.take<float>(threads * a.in_features)) {}

  void run() const {
    const Rows rows = {args.x, args.dtype, args.in_features};
    const Product product(tokens, {args.tiles, args.out_features});
    Phase quantized([this] { return tokens.num_units(); },
                    [&](int64_t unit, int64_t worker) {
                      tokens.quantize(
                          unit, [&](int64_t t) { return rows.in(first + t, converted + worker * args.in_features); });
                    });
    Phase multiplied([&] { return product.num_units(); },
                     [&](int64_t unit, int64_t) {
                       product.run(unit, [&](int64_t t, int64_t row, const float* values, int64_t n) {
                         write_rows(args.out, args.dtype, args.out_features, first + t, row, values, n);
                       });
                     });
    run_phases(num_threads, quantized, multiplied);
  }
};

int check(const mobilemoe_linear_args* args, int64_t num_threads) {
  if (args == nullptr) return fail("args is null");
  const auto& a = *args;
  if (const int status = check_dense("in_features", a.num_tokens, a.in_features, a.dtype, num_threads)) return status;
  if (const int status = check_matrix("weight", {a.tiles, a.out_features})) return status;
  if (a.num_tokens > 0 && (a.x == nullptr || a.out == nullptr)) return fail("x or out is null");
  return MOBILEMOE_OK;
}

}  // namespace

int check_dense(const char* name, int64_t num_tokens, int64_t width, int32_t dtype, int64_t num_threads) {
  if (num_tokens < 0 || num_tokens > kMaxTokens) return fail("num_tokens=%lld", (long long)num_tokens);
  if (width < kGroup || width > kMaxWidth || width % kGroup != 0) {
    return fail("%s=%lld is not a multiple of %d up to %lld", name, (long long)width, kGroup, (long long)kMaxWidth);
  }
  if (dtype != MOBILEMOE_FP32 && dtype != MOBILEMOE_BF16) return fail("dtype=%d is neither FP32 nor BF16", dtype);
  return check_threads(num_threads);
}

int check_matrix(const char* name, const mobilemoe_matrix& matrix) {
  if (matrix.out_features < 1 || matrix.out_features > kMaxWidth) {
    return fail("%s has %lld outputs", name, (long long)matrix.out_features);
  }
  if (matrix.tiles == nullptr) return fail("%s is null", name);
  return MOBILEMOE_OK;
}

}  // namespace mobilemoe

int mobilemoe_linear(const mobilemoe_linear_args* args, int64_t num_threads) {
  using namespace mobilemoe;
  if (const int status = check(args, num_threads)) return status;
  return run_passes<Linear>(*args, num_threads);
}
