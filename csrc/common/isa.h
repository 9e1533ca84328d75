// One entry point, compiled once per instruction set, chosen at run time.
//
// A cpu.cpp is compiled with DLA_ISA=baseline, avx2 and avx512 and defines its entry points in
// `namespace dla::DLA_ISA`. Its op.h declares them with DLA_CPU_ENTRY, which also defines the
// dispatching function dla::cpu::<name>.
//
// Doubles serve to check gradients. There is no AVX-512 code for them, AVX2's is used: that spares
// everybody a tenth of the time that the package takes to compile.
#pragma once

#include <algorithm>

#include "common/args.h"

namespace dla {

enum class Simd : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best instruction set of this processor that the module has code for, at most the one named
// by the environment variable DLA_SIMD. Decided once, at the first call.
Simd simd_level();

inline Simd simd_level_for(DType dtype) {
  return dtype == DType::f64 ? std::min(simd_level(), Simd::avx2) : simd_level();
}

}  // namespace dla

#ifdef DLA_X86_ISAS
#define DLA_CPU_ENTRY(name, Args)                                \
  namespace dla::baseline { void name(const Args&); }            \
  namespace dla::avx2 { void name(const Args&); }                \
  namespace dla::avx512 { void name(const Args&); }              \
  namespace dla::cpu {                                           \
  inline void name(const Args& args) {                           \
    switch (simd_level_for(args.dtype)) {                        \
      case Simd::avx512: return avx512::name(args);              \
      case Simd::avx2: return avx2::name(args);                  \
      case Simd::baseline: return baseline::name(args);          \
    }                                                            \
  }                                                              \
  }
#else
#define DLA_CPU_ENTRY(name, Args)                                             \
  namespace dla::baseline { void name(const Args&); }                         \
  namespace dla::cpu { inline void name(const Args& args) { baseline::name(args); } }
#endif
