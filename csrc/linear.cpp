// linear for few rows: the weight is read once, where a general matrix product would pack it first for each call.
#include <algorithm>

#include "native.h"

namespace icl {
namespace {

constexpr int64_t kDepth = 1024;  // elements multiplied at a time: those of a few columns stay in the first-level cache
constexpr int64_t kMaxPanel = 96;  // columns of a thread's turn, in which the rows are read once from further away

}  // namespace
}  // namespace icl

#define TILES "linear_tile.h"
#define KERNEL multiply
#include "versions.h"

namespace icl {

void linear(const Linear& args) {
    for (const int64_t size : {args.R, args.E, args.O}) require_range("size", size, 0);
    const Version chosen = version(args.isa);
    const auto multiply = args.bfloat16 ? chosen.bfloat16 : chosen.float32;
    const int64_t threads = max_threads();
    const int64_t panel = std::clamp<int64_t>((args.O / (2 * threads) + 7) / 8 * 8, 8, kMaxPanel);
    const int64_t panels = (args.O + panel - 1) / panel, bytes = round_up(args.R * panel * sizeof(float));
    const auto workspace = allocate(threads * bytes);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (panels > 1)
    for (int64_t p = 0; p < panels; ++p) {
        multiply(args, p * panel, std::min(panel, args.O - p * panel),
                 reinterpret_cast<float*>(workspace.get() + thread_index() * bytes));
    }
}

}  // namespace icl
