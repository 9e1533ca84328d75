// The entries of a module: _dla_native (DLA_BACKEND=cpu) or _dla_native_cuda (DLA_BACKEND=cuda), which
// offer the same functions. Callers are dla_kernels/ops/<op>/cpp.py.
#include "entries.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <type_traits>

#include "common/args.h"
#include "common/isa.h"
#include "ops/base_attention/op.h"
#include "ops/cell/op.h"
#include "ops/gate/op.h"
#include "ops/global_pool/op.h"
#include "ops/light_attention/op.h"
#include "ops/residual_gate/op.h"
#include "ops/residual_norm/op.h"

namespace dla {
namespace {

template <class T>
constexpr Kind kind_of() {
  if constexpr (std::is_same_v<T, const void*>) return Kind::source;
  else if constexpr (std::is_same_v<T, void*>) return Kind::target;
  else if constexpr (std::is_same_v<T, bool>) return Kind::flag;
  else if constexpr (std::is_same_v<T, double>) return Kind::real;
  else if constexpr (std::is_same_v<T, std::int64_t>) return Kind::int64;
  else if constexpr (std::is_enum_v<T>) return kind_of<std::underlying_type_t<T>>();
  else static_assert(std::is_same_v<T, int>, "no kind of field");
  return Kind::int32;
}

template <class T>
struct FieldType {
  static constexpr Kind kind = kind_of<T>();
  static constexpr bool is_list = false;
};
template <class T>
struct FieldType<std::vector<T>> {
  static_assert(!std::is_enum_v<T>);
  static constexpr Kind kind = kind_of<T>();
  static constexpr bool is_list = true;
};

template <class Args>
std::span<const Field> fields_of;  // set by DLA_ENTRY

template <class Args, auto function>
Entry entry(const char* name) {
  return {name, fields_of<Args>,
          []() -> std::shared_ptr<void> { return std::make_shared<Args>(); },
          [](const void* args) -> std::shared_ptr<void> {
            return std::make_shared<Args>(*static_cast<const Args*>(args));
          },
          [](const void* args) -> std::int64_t {
            if constexpr (std::is_void_v<decltype(function(*static_cast<const Args*>(args)))>)
              return function(*static_cast<const Args*>(args)), 0;
            else
              return function(*static_cast<const Args*>(args));
          }};
}

// DLA_ENTRY(function, Struct, field, field, ...): __VA_OPT__ recursion over the field names.
#define DLA_PARENS ()
#define DLA_REPEAT1(...) DLA_REPEAT2(DLA_REPEAT2(DLA_REPEAT2(DLA_REPEAT2(__VA_ARGS__))))
#define DLA_REPEAT2(...) DLA_REPEAT3(DLA_REPEAT3(DLA_REPEAT3(DLA_REPEAT3(__VA_ARGS__))))
#define DLA_REPEAT3(...) DLA_REPEAT4(DLA_REPEAT4(DLA_REPEAT4(DLA_REPEAT4(__VA_ARGS__))))
#define DLA_REPEAT4(...) __VA_ARGS__
#define DLA_FIELD(Struct, field, ...)                                                        \
  {#field, offsetof(Struct, field), FieldType<decltype(Struct::field)>::kind,                \
   FieldType<decltype(Struct::field)>::is_list}                                              \
  __VA_OPT__(, DLA_FIELD_AGAIN DLA_PARENS(Struct, __VA_ARGS__))
#define DLA_FIELD_AGAIN() DLA_FIELD
#define DLA_ENTRY(function, Struct, ...)                                                     \
  {                                                                                          \
    static constexpr Field fields[] = {DLA_REPEAT1(DLA_FIELD(Struct, __VA_ARGS__))};         \
    fields_of<Struct> = fields;                                                              \
    all.push_back(entry<Struct, &DLA_BACKEND::function>(#function));                         \
  }

std::string compiler() {
#ifdef __clang__
  return __VERSION__;
#else
  return "GCC " __VERSION__;
#endif
}

#ifdef DLA_CPU

Simd detect_simd() {
  Simd level = Simd::baseline;
#ifdef DLA_X86_ISAS
  // Every processor with AVX2 and FMA has F16C as well.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    level = Simd::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      level = Simd::avx512;
  }
#endif
  const char* cap = std::getenv("DLA_SIMD");
  if (cap == nullptr || *cap == '\0') return level;
  const std::string name = cap;
  if (name == "baseline") return Simd::baseline;
  if (name == "avx2") return std::min(level, Simd::avx2);
  if (name == "avx512") return level;
  throw std::invalid_argument("DLA_SIMD: expected baseline, avx2 or avx512, got '" + name + "'");
}

std::string name_of(Simd level) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(level)];
}

#endif  // DLA_CPU

}  // namespace

#ifdef DLA_CPU
Simd simd_level() {
  static const Simd level = detect_simd();
  return level;
}
#endif

std::vector<Fact> facts() {
  return {
      {"compiler", compiler},
#ifdef DLA_CPU
      {"simd_level", [] { return name_of(simd_level()); }},
#ifdef DLA_X86_ISAS
      {"simd_levels", [] { return std::string("baseline, avx2, avx512"); }},
#else
      {"simd_levels", [] { return std::string("baseline"); }},
#endif
#ifdef _OPENMP
      {"thread_pool", [] { return std::string("OpenMP"); }},
#else
      {"thread_pool", [] { return std::string(); }},  // one thread
#endif
      {"without_cuda", [] { return std::string(DLA_WITHOUT_CUDA); }},  // empty: _dla_native_cuda is built
#else
      {"targets", [] { return std::string(DLA_CUDA_TARGETS); }},
#endif
  };
}

std::vector<Entry> entries() {
  std::vector<Entry> all;

  DLA_ENTRY(global_pool_forward, GlobalPoolForward, x, out, batch, channels, area, dtype,
            channels_last, threads, stream);
  DLA_ENTRY(global_pool_backward, GlobalPoolBackward, grad, dx, batch, channels, area, dtype,
            channels_last, threads, stream);

  DLA_ENTRY(gate_forward, GateForward, x, gates, out, batch, channels, area, channels_last, dtype,
            threads, stream);
  DLA_ENTRY(gate_backward, GateBackward, grad, x, gates, dx, dgates, batch, channels, area,
            channels_last, dtype, threads, stream);

  DLA_ENTRY(residual_gate_forward, ResidualGateForward, u, h, shortcut, out, batch, channels, area,
            channels_last, dtype, threads, stream);
  DLA_ENTRY(residual_gate_backward, ResidualGateBackward, grad, u, h, out, du, dh, dshortcut, batch,
            channels, area, channels_last, dtype, threads, stream);

  DLA_ENTRY(cell_forward, CellForward, y, state, params, out, batch, channels, hidden, kind,
            activation, dtype, threads, stream);
  DLA_ENTRY(cell_backward, CellBackward, grad_out, y, state, params, grad_y, grad_state,
            grad_params, scratch, batch, channels, hidden, kind, activation, dtype, threads,
            stream);

  DLA_ENTRY(residual_norm_forward, ResidualNormForward, x, weight, bias, batch, channels, height,
            width, channels_last, dtype, norm, eps, threads, stream, scratch, pieces, shortcut,
            mean_in, var_in, out, mean, var);
  DLA_ENTRY(residual_norm_backward, ResidualNormBackward, x, weight, bias, batch, channels, height,
            width, channels_last, dtype, norm, eps, threads, stream, scratch, pieces, grad, out,
            mean, var, dx, dshortcut, dweight, dbias);

  DLA_ENTRY(light_attention_forward, LightAttentionForward, x, p, state, cell_params, q_weight,
            k_weight, v_weight, prev_weight, lam, norm_weight, norm_bias, branch_weight,
            branch_bias, drop_scale, batch, channels, height, width, head_dim, kernel_size, hidden,
            dtype, cell, activation, norm, branch_norm, channels_last, sigmoid_gate, first_sample,
            residual, join, eps, branch_eps, threads, stream, scratch, mean_in, var_in,
            branch_mean_in, branch_var_in, out, o, new_state, mean, var, branch_mean, branch_var,
            summary);

  DLA_ENTRY(light_attention_backward, LightAttentionBackward, x, p, state, cell_params, q_weight,
            k_weight, v_weight, prev_weight, lam, norm_weight, norm_bias, branch_weight,
            branch_bias, drop_scale, batch, channels, height, width, head_dim, kernel_size, hidden,
            dtype, cell, activation, norm, branch_norm, channels_last, sigmoid_gate, first_sample,
            residual, join, eps, branch_eps, threads, stream, scratch, grad_out, grad_o, grad_state,
            mean, var, branch_mean, branch_var, new_state, summary, dx, dp, dstate, dq_weight,
            dk_weight, dv_weight, dprev_weight, dlam, dnorm_weight, dnorm_bias, dbranch_weight,
            dbranch_bias, dcell_params);

  DLA_ENTRY(base_attention_forward, BaseAttentionForward, x, values, state, keys, gates, pooled,
            cell_params, q_weight, k_weight, key_weights, v_weight, norm_weight, norm_bias,
            drop_scale, batch, channels, height, width, head_dim, kernel_size, hidden, dtype, cell,
            activation, norm, channels_last, sigmoid_gate, first_sample, relu, residual,
            gated_features, eps, threads, stream, scratch, mean_in, var_in, out, v, state_out,
            keys_out, gates_out, pooled_v, scores, mean, var, pooled_x);
  DLA_ENTRY(base_attention_backward, BaseAttentionBackward, x, values, state, keys, gates, pooled,
            cell_params, q_weight, k_weight, key_weights, v_weight, norm_weight, norm_bias,
            drop_scale, batch, channels, height, width, head_dim, kernel_size, hidden, dtype, cell,
            activation, norm, channels_last, sigmoid_gate, first_sample, relu, residual,
            gated_features, eps, threads, stream, scratch, grad_out, grad_v, grad_state, grad_keys,
            grad_gates, grad_pooled_v, grad_pooled_x, later_grads, later_weights, mean, var, scores,
            pooled_x, dx, g, weights, dv, dstate, dkeys, dgates, dpooled, dcell_params, dq_weight,
            dk_weight, dkey_weights, dv_weight, dnorm_weight, dnorm_bias);

#ifndef DLA_CPU
  all.push_back(entry<LightAttentionForward, &cuda::light_attention_forward_scratch>(
      "light_attention_forward_scratch"));
  all.push_back(entry<LightAttentionBackward, &cuda::light_attention_backward_scratch>(
      "light_attention_backward_scratch"));
  all.push_back(entry<BaseAttentionForward, &cuda::base_attention_forward_scratch>(
      "base_attention_forward_scratch"));
  all.push_back(entry<BaseAttentionBackward, &cuda::base_attention_backward_scratch>(
      "base_attention_backward_scratch"));
#endif
  return all;
}

}  // namespace dla
