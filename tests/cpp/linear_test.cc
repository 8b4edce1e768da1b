// Shares of a matrix's tiles: complete, in order, and even enough that no thread waits long for another.
#include "model/linear.h"

#include "check.h"

namespace {

sr::Linear shape(std::vector<int> part_rows, int cols, int panel_rows) {
  sr::Linear w;
  w.cols = cols;
  w.tile_begin = {0};
  w.row_begin = {0};
  for (int rows : part_rows) {
    sr::PanelMatrix m;
    m.kind = sr::WeightKind::q4;
    m.rows = rows;
    m.cols = cols;
    m.panel_rows = panel_rows;
    w.parts.push_back(m);
    w.tile_begin.push_back(w.tile_begin.back() + m.tiles());
    w.row_begin.push_back(w.row_begin.back() + rows);
    w.rows += rows;
  }
  return w;
}

}  // namespace

TEST_CASE("shares: every tile belongs to one thread, and large matrices are cut evenly") {
  for (const auto& part_rows : {std::vector<int>{49152}, {576}, {960}, {3072}, {64}, {2048, 512, 512}, {100, 50}}) {
    for (int panel_rows : {64, 320, 512, 1536, 2048, 65536}) {
      for (int threads : {1, 2, 3, 4, 7, 16, 64}) {
        for (int unit : {1, 2}) {
          sr::Linear w = shape(part_rows, 576, panel_rows);
          if (w.tiles() % unit) continue;
          sr::set_shares(&w, threads, unit);
          CHECK_EQ(w.share.size(), size_t(threads) + 1);
          CHECK_EQ(w.share.front(), 0);
          CHECK_EQ(w.share.back(), w.tiles());
          int most = 0;
          for (int t = 0; t < threads; t++) {
            CHECK(w.share[size_t(t)] <= w.share[size_t(t) + 1]);
            CHECK_EQ(w.share[size_t(t)] % unit, 0);
            most = std::max(most, w.share[size_t(t) + 1] - w.share[size_t(t)]);
          }
          // Even to a unit, plus what moving both ends of a share to a panel's border may cost.
          const double even = double(w.tiles()) / threads;
          if (most > even * 1.25 + 2 * unit) {
            sr_test::fail(std::to_string(part_rows[0]).c_str(), panel_rows,
                          std::to_string(threads) + " threads, unit " + std::to_string(unit) + ": " +
                              std::to_string(most) + " of " + std::to_string(w.tiles()));
          }
        }
      }
    }
  }
}

TEST_CASE("outputs: rows of a part begin where its padded tiles begin") {
  const sr::Linear w = shape({100, 50, 64}, 32, 64);
  CHECK_EQ(w.output_index(0), 0);
  CHECK_EQ(w.output_index(99), 99);
  CHECK_EQ(w.output_index(100), 128);
  CHECK_EQ(w.output_index(149), 177);
  CHECK_EQ(w.output_index(150), 192);
  CHECK_EQ(w.padded_rows(), 256);
}
