// The product with FEAT_DotProd, of most 64-bit ARM processors since 2018: one instruction adds four products.
#include "problem.h"

#if defined(QJAX_HAS_DOTPROD)
#define QJAX_128 QJAX_TARGET_DOTPROD
#define QJAX_INLINE128 QJAX_TARGET_DOTPROD static inline __attribute__((always_inline))

#include "rows128_dotprod.h"

namespace qjax {

QJAX_128 void panel_dotprod(const Dot& d, int64_t n0, int64_t n1) { panel_128<4, Lanes>(d, n0, n1); }

}  // namespace qjax
#endif
