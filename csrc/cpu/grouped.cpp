// Low-rank parts of rows by segment (lora_kernels/reference/grouped_linear.py, equations 14 and 15): each segment's is a call of
// low_rank.cpp, and threads take segments, or where those are fewer than threads each in turn is computed by all.
#include "cpu.h"

namespace lora_kernels::cpu {
namespace {

template <typename Run>
void for_each_segment(const std::vector<Segment>& segments, int threads, const Run& run) {
  const auto count = static_cast<std::int64_t>(segments.size());
  const bool apart = count >= threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (apart)
  for (std::int64_t e = 0; e < count; ++e) run(segments[e], apart ? 1 : threads);
}

LowRank term_of(const Segment& segment, const Rows& x) {
  LowRank term = segment.term;
  term.x = x.from(segment.start);
  term.M = segment.stop - segment.start;
  term.first = segment.start;
  return term;
}

}  // namespace

void grouped_forward(const std::vector<Segment>& segments, const Rows& x, const Rows& y, bool add, const Rows& h, int threads) {
  for_each_segment(segments, threads, [&](const Segment& segment, int own) {
    low_rank_forward(term_of(segment, x), segment.c, y.from(segment.start), add, h.from(segment.start), own);
  });
}

void grouped_backward(const std::vector<Segment>& segments, const Rows& x, const Rows& dy, const Rows& h, const Rows& dx, bool add,
                      int threads) {
  for_each_segment(segments, threads, [&](const Segment& segment, int own) {
    const std::int64_t first = segment.start;
    const LowRankGradients to{{}, dy.from(first), h.from(first), dx.from(first), segment.dA, segment.dB, segment.dc, add};
    low_rank_backward(term_of(segment, x), to, own);
  });
}

}  // namespace lora_kernels::cpu
