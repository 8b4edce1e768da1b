// These sources are compiled once per Arm variant, each into its own namespace and with its own flags (CMakeLists.txt):
//   SR_NEON = neon           ARMv8.0: products of bytes are added up in 16 bits
//   SR_NEON = neon_dotprod   sdot, four products an instruction
//   SR_NEON = neon_i8mm      usdot (unsigned codes times signed inputs), and smmla for prefill
#pragma once

#if !defined(SR_NEON) || !defined(SR_NEON_LEVEL)
#error "SR_NEON (the namespace) and SR_NEON_LEVEL (0, 1, 2) come from CMakeLists.txt"
#endif
#if SR_NEON_LEVEL >= 1 && !defined(__ARM_FEATURE_DOTPROD)
#error "this variant needs the dot-product extension in -march"
#endif
#if SR_NEON_LEVEL >= 2 && !defined(__ARM_FEATURE_MATMUL_INT8)
#error "this variant needs the i8mm extension in -march"
#endif
