// What Python hands to the kernels: plain structures, the same for every instruction set (ctypes mirrors them).
//
// Strides count elements. A pointer to what was not given is null.

#pragma once

#include <cstdint>

namespace linvision {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1 };

enum Status : int32_t { kDone = 0, kOutOfMemory = 1, kUnsupported = 2 };

// Tokens (B, S, H, D) or gates (B, S, H): the last axis of tokens is contiguous.
struct Strided {
  void* data;
  int64_t batch, token, head;
};

struct MlstmState {
  float *C, *n, *m;  // C^T (B, H, D, D), n (B, H, D), m (B, H), contiguous
};

struct MlstmForward {
  Strided q, k, v, i, f, h;  // gates are float32
  MlstmState initial, final;
  int64_t batch, tokens, heads, head_dim;
  int32_t dtype, reverse, threads;
};

struct MlstmBackward {
  Strided q, k, v, i, f, h, dh, dq, dk, dv, di, df;  // gates and their gradients are float32
  MlstmState initial, d_final, d_initial;            // without m
  int64_t batch, tokens, heads, head_dim;
  int32_t dtype, reverse, threads;
};

// Tokens u, delta, z, residual (B, S, E), B, C (B, S, N): the last axis is contiguous, `head` is not used. A is (N, E).
struct SelectiveScan {
  Strided u, delta, B, C, z, residual;
  const float *A, *D, *delta_bias;
  int64_t batch, tokens, width, states, interval, group;  // interval: tokens between kept states
  int32_t dtype, delta_softplus, reverse, threads;        // group: channels of a piece of work, a multiple of 16
};

struct SelectiveScanForward {
  SelectiveScan inputs;
  Strided y;
  const float* initial;  // (B, E, N)
  float *final, *kept;   // (B, E, N), (S / interval, B, N, E)
};

struct SelectiveScanBackward {
  SelectiveScan inputs;
  Strided dy, du, d_delta, dz, d_residual;
  const float *kept, *d_final;
  float* d_initial;                   // (B, E, N)
  float *dA, *dB, *dC, *dD, *d_bias;  // (B, N, E), twice (groups, B, S, N), twice (B, E): to be summed over axis 0
};

// Tokens (B, rows, columns, channels), channels contiguous.
struct Grid {
  void* data;
  int64_t batch, row, column;
};

struct ConvShape {
  int64_t batch, rows, columns, channels, kernel_rows, kernel_columns;
  int64_t top, left;  // taps before the token's own
};

struct DepthwiseConvForward {
  Grid x, y;
  const float *weight, *bias;  // (channels, kernel_rows, kernel_columns) and, where given, (channels,)
  ConvShape shape;
  int32_t dtype, silu, reverse, threads;
};

struct DepthwiseConvBackward {
  Grid x, dy, dx;
  Grid d_sum;  // float32, for the gradient before the activation; only with one
  const float *weight, *bias;
  float *dweight, *dbias;
  ConvShape shape;
  int32_t dtype, silu, reverse, threads;
};

struct MlstmInputsForward {
  Strided c, x, q, k, v;                              // (B, S, E); without q only the gates are computed
  float *i, *f;                                       // (B, S, H), contiguous
  const float *weights[3], *biases[3];                // (E / 4, 4, 4) and, where given, (E,), of q, k and v
  const float *gate_weights[2], *gate_biases[2];      // (H, 3 E) and (H,), of i and f
  int64_t batch, tokens, width, heads;
  int32_t dtype, threads;
};

// The gates of `inputs`, then the mLSTM of the q, k and v that they would give.
struct ProjectedMlstmForward {
  MlstmInputsForward inputs;
  MlstmForward mlstm;
};

struct MlstmInputsBackward {
  Strided c, x, dq, dk, dv, dc, dx;
  const float *di, *df;
  const float *weights[3], *biases[3], *gate_weights[2];
  float *dweights[3], *dbiases[3], *dgate_weights[2], *dgate_biases[2];
  int64_t batch, tokens, width, heads;
  int32_t dtype, threads;
};

struct GatedNormForward {
  Strided h;        // (B, S, H, D)
  Strided c, z, y;  // (B, S, E); z where given
  const float *weight, *bias, *skip;
  int64_t batch, tokens, heads, head_dim;
  float eps;
  int32_t dtype, threads;
};

struct GatedNormBackward {
  Strided h, dh;             // (B, S, H, D)
  Strided c, z, dy, dc, dz;  // (B, S, E)
  const float *weight, *bias, *skip;
  float *dweight, *dbias, *dskip;
  int64_t batch, tokens, heads, head_dim;
  float eps;
  int32_t dtype, threads;
};

// A layer norm before a linear layer; without a weight there is none.
struct LayerNorm {
  const float *weight, *bias;
  float eps;
};

// Weights (outputs, inputs), contiguous and of the tokens' type; bias (outputs,) where given.
struct Linear {
  const void* weight;
  const float* bias;
  int64_t inputs, outputs;
};

// Tokens (rows, channels), channels contiguous.
struct Rows {
  void* data;
  int64_t stride;
};

// y = residual + layer(norm(x) SiLU(gate))
struct LinearForward {
  Rows x, gate, residual, y;
  LayerNorm norm;
  Linear layer;
  int64_t rows;
  int32_t dtype, threads;
};

// y = residual + second(GELU(first(norm(x))))
struct MlpForward {
  Rows x, residual, y;
  LayerNorm norm;
  Linear first, second;
  int64_t rows;
  int32_t dtype, threads;
};

// y = x + proj(attention(qkv(norm(x)))), within windows of the grid.
struct WindowAttentionForward {
  Grid x, y;
  LayerNorm norm;
  Linear qkv, proj;
  int64_t batch, rows, columns, heads, window;
  int32_t dtype, threads;
};

}  // namespace linvision
