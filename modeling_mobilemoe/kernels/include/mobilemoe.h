// C interface of the MobileMoE kernels: INT4 weights as released, INT8 arithmetic, any number of threads.
//
// Shapes: T tokens, D model width, F expert width, E experts, and N and K output and input features of a linear.
// Matrices are row-major and dense, but for weights: these are tiles of 32 outputs, in the order in which they are
// read, 18 bytes for each input (README.md beside this folder; `tiles_mobilemoe.py` makes them of a checkpoint's
// tensors). Tiles of one output column lie side by side; outputs beyond the last one, up to a multiple of 32, are
// zero.
//
// No function allocates once it has seen its largest input, throws, or aborts: a bad argument is a status and a
// sentence. Calls from several threads at once are fine. A call computes on its own thread and on up to
// `num_threads` - 1 others, which the process keeps for the next one; it never waits for one that has not begun.
#ifndef MOBILEMOE_H_
#define MOBILEMOE_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define MOBILEMOE_EXPORT __declspec(dllexport)
#else
#define MOBILEMOE_EXPORT __attribute__((visibility("default")))
#endif

enum { MOBILEMOE_OK = 0, MOBILEMOE_BAD_ARGUMENT = 1, MOBILEMOE_OUT_OF_MEMORY = 2 };

// Element types of activations, and of a cache. Everything inside is computed from and in FP32.
enum { MOBILEMOE_FP32 = 0, MOBILEMOE_BF16 = 1, MOBILEMOE_INT8 = 2 };

typedef struct {
  int64_t num_tokens, dim, expert_dim, num_experts, top_k;
  float route_scale;
  int32_t dtype;               // of x and out
  const void* x;               // [T, D]
  const float* router;         // [E, D]; null when top_k_index and top_k_weights say where tokens go
  const float* bias;           // [E]: selects, never weighs; null is zero
  const int64_t* top_k_index;  // [T, top_k], or null
  const void* top_k_weights;   // [T, top_k] of weights_dtype, or null
  int32_t weights_dtype;
  const uint8_t* gate_up;  // tiles [E, F / 32, 2 * D * 18]: those of 32 gates, then those of their ups
  const uint8_t* down;     // tiles [E, D / 32, F * 18]
  void* out;               // [T, D]
} mobilemoe_moe_ffn_args;

// out = sum over the top_k experts e of weight_e * down_e(silu(gate_e(x)) * up_e(x)).
MOBILEMOE_EXPORT int mobilemoe_moe_ffn(const mobilemoe_moe_ffn_args* args, int64_t num_threads);

typedef struct {
  int64_t num_tokens, in_features, out_features;
  int32_t dtype;         // of x and out
  const void* x;         // [T, K]
  const uint8_t* tiles;  // [N / 32, K * 18]
  void* out;             // [T, N]
} mobilemoe_linear_args;

// out = x @ weight.T
MOBILEMOE_EXPORT int mobilemoe_linear(const mobilemoe_linear_args* args, int64_t num_threads);

// INT4 weights of a linear whose inputs are known.
typedef struct {
  const uint8_t* tiles;  // [out_features / 32, K * 18]
  int64_t out_features;
} mobilemoe_matrix;

typedef struct {
  int64_t num_tokens, dim;
  int32_t dtype;              // of x and out
  const void* x;              // [T, D]
  mobilemoe_matrix gate, up;  // of D inputs, with as many outputs
  mobilemoe_matrix down;      // of their outputs, D outputs
  void* out;                  // [T, D]
} mobilemoe_mlp_args;

// out = down(silu(gate(x)) * up(x)), the shared expert.
MOBILEMOE_EXPORT int mobilemoe_mlp(const mobilemoe_mlp_args* args, int64_t num_threads);

typedef struct {
  int64_t num_tokens, dim, head_dim;
  float eps;
  int32_t dtype;                          // of x and the outputs
  const void* x;                          // [T, D]
  mobilemoe_matrix query, key, value;     // of D inputs
  const float *cos, *sin;                 // [T, head_dim / 2]
  void *query_out, *key_out, *value_out;  // [T, out_features]
} mobilemoe_attention_inputs_args;

// Three linears; then, on each head of the first two, rotation of adjacent channels and a weightless RMS norm.
MOBILEMOE_EXPORT int mobilemoe_attention_inputs(const mobilemoe_attention_inputs_args* args, int64_t num_threads);

// Keys and values of a layer, 64 positions in a block. The type is FP32, BF16, or INT8 with a step for every head and
// position; attention then rounds queries to INT8 too.
typedef struct {
  int32_t type;
  int64_t num_kv_heads, head_dim, num_blocks;
  void* blocks;  // [num_kv_heads, num_blocks, bytes of a block]: src/cache.h says what is inside
} mobilemoe_cache;

// The type whose blocks have so many bytes, or -1: 128 * head_dim elements, and 512 bytes of steps in INT8.
MOBILEMOE_EXPORT int mobilemoe_cache_type(int64_t head_dim, int64_t block_bytes);

// Writes key and value [T, num_kv_heads, head_dim] in FP32 at positions `start` and on.
MOBILEMOE_EXPORT int mobilemoe_update_cache(const mobilemoe_cache* cache, int64_t start, int64_t num_tokens,
                                            const float* key, const float* value, int64_t num_threads);

typedef struct {
  int64_t num_tokens, start;  // the first token's position
  int64_t num_heads;
  const float* query;     // [T, num_heads, head_dim]
  mobilemoe_cache cache;  // with the new tokens' keys and values
  float* out;             // [T, num_heads, head_dim]
} mobilemoe_attention_args;

// Token t attends to positions 0 to start + t, scaled by 1 / sqrt(head_dim).
MOBILEMOE_EXPORT int mobilemoe_attention(const mobilemoe_attention_args* args, int64_t num_threads);

typedef struct {
  int64_t num_tokens, start, dim;                   // the first token's position
  float eps;                                        // of all norms
  const float* x;                                   // [T, D]
  const float *attention_norm, *feed_forward_norm;  // [D]
  mobilemoe_matrix query, key, value, output;       // attention: of D inputs, but for the output
  const float *cos, *sin;                           // [T, head_dim / 2]
  mobilemoe_cache cache;                            // the new tokens' keys and values are written
  mobilemoe_matrix gate, up, down;                  // the shared expert
  mobilemoe_moe_ffn_args experts;                   // its weights, num_experts, expert_dim, top_k and route_scale; no
                                                    // routed experts when num_experts is 0
  float* out;                                       // [T, D]
} mobilemoe_layer_args;

// h = x + output(attention(attention_inputs(norm(x)))); out = (h + moe_ffn(norm(h))) + mlp(norm(h)): the operators
// above, with the same bits. All FP32.
MOBILEMOE_EXPORT int mobilemoe_decoder_layer(const mobilemoe_layer_args* args, int64_t num_threads);

// out [T, D] = x / sqrt(mean(x^2) + eps) * weight, all FP32.
MOBILEMOE_EXPORT int mobilemoe_rms_norm(const float* x, const float* weight, int64_t num_tokens, int64_t dim,
                                        float eps, float* out, int64_t num_threads);

// out [T, D] in FP32 = the weights of outputs `tokens` [T] of a linear with D inputs.
MOBILEMOE_EXPORT int mobilemoe_embedding(const int64_t* tokens, const mobilemoe_matrix* table, int64_t num_tokens,
                                         int64_t dim, float* out, int64_t num_threads);

// The router alone, as mobilemoe_moe_ffn runs it: index [T, top_k] and weight [T, top_k].
MOBILEMOE_EXPORT int mobilemoe_route(const mobilemoe_moe_ffn_args* args, int64_t* index, float* weight,
                                     int64_t num_threads);

// What the last failed call on this thread had to say.
MOBILEMOE_EXPORT const char* mobilemoe_last_error(void);

// The instruction set in use: the best that this machine has until another one is chosen. Not during other calls.
// Names: "portable", "avx2", "avx512", "neon", "i8mm". A name that this machine lacks is MOBILEMOE_BAD_ARGUMENT.
MOBILEMOE_EXPORT const char* mobilemoe_isa(void);
MOBILEMOE_EXPORT int mobilemoe_set_isa(const char* name);

#ifdef __cplusplus
}
#endif
#endif  // MOBILEMOE_H_
