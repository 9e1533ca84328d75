// One entry point, compiled once per instruction set, chosen at run time.
//
// A cpu.cpp is compiled with DLA_ISA=baseline, avx2 and avx512 and defines its entry points in
// `namespace dla::DLA_ISA`. Its op.h declares them with DLA_CPU_ENTRY, which also defines the
// dispatching function dla::cpu::<name>.
#pragma once

namespace dla {

enum class Simd : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best instruction set of this processor that the module has code for, at most the one named
// by the environment variable DLA_SIMD. Decided once, at the first call.
Simd simd_level();

}  // namespace dla

#ifdef DLA_X86_ISAS
#define DLA_CPU_ENTRY(name, Args)                                \
  namespace dla::baseline { void name(const Args&); }            \
  namespace dla::avx2 { void name(const Args&); }                \
  namespace dla::avx512 { void name(const Args&); }              \
  namespace dla::cpu {                                           \
  inline void name(const Args& args) {                           \
    switch (simd_level()) {                                      \
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
