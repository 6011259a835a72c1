// y = x W^T + b and its gradients, by the kernels' matrix product.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../cpu/dispatch.h"

namespace fastseq {
namespace ops {

// A layer from `in` to `out` features, of M rows. Rows of w lie w_row elements apart, others of x,
// y and their gradients are contiguous one after the other unless said.
template <class T>
struct Linear {
  int64_t rows, in, out;
  const T* w;
  int64_t w_row;

  // Elements below which a loop over them is not shared out.
  static constexpr int64_t kWorthSharing = int64_t(1) << 16;

  // To rows y[m], wherever they are.
  void forward(const T* x, const T* b, const std::vector<T*>& y, const Threads& threads) const {
    // Columns at a time: their weights, transposed, stay in the second-level cache.
    constexpr int64_t kColumns = 256;
    const std::unique_ptr<T[]> transposed(new T[size_t(std::min(kColumns, out) * in)]);
    std::vector<T*> to(size_t(rows), nullptr);
    for (int64_t first = 0; first < out; first += kColumns) {
      const int64_t n = std::min(kColumns, out - first);
      share(in, n * in, threads, [&](int64_t k0, int64_t k1) {
        transpose(w + first * w_row, n, k0, k1, transposed.get());
      });
      share(rows, n * rows, threads, [&](int64_t m0, int64_t m1) {
        for (int64_t m = m0; m < m1; ++m) {
          to[size_t(m)] = y[size_t(m)] + first;
          if (b) {
            std::copy_n(b + first, n, to[size_t(m)]);
          } else {
            std::fill_n(to[size_t(m)], n, T(0));
          }
        }
      });
      Gemm<T> g{};
      g.M = rows, g.N = n, g.K = in;
      g.a = x, g.a_m = in, g.a_k = 1;
      g.b = transposed.get(), g.ldb = n;
      g.c_rows = to.data();
      g.accumulate = true;
      kernels().basic.of<T>()->gemm(g, threads);
    }
  }

  // dx (+)= dy W.
  void input_gradient(const T* dy, T* dx, bool accumulate, const Threads& threads) const {
    Gemm<T> g{};
    g.M = rows, g.N = in, g.K = out;
    g.a = dy, g.a_m = out, g.a_k = 1;
    g.b = w, g.ldb = w_row;
    g.c = dx, g.ldc = in;
    g.accumulate = accumulate;
    kernels().basic.of<T>()->gemm(g, threads);
  }

  // dw = dy^T x, rows of w_row elements, and db, the sums of dy, which may be null.
  void weight_gradients(const T* dy, const T* x, T* dw, T* db, const Threads& threads) const {
    Gemm<T> g{};
    g.M = out, g.N = in, g.K = rows;
    g.a = dy, g.a_m = 1, g.a_k = out;
    g.b = x, g.ldb = in;
    g.c = dw, g.ldc = w_row;
    g.chain = chain_over(rows);
    kernels().basic.of<T>()->gemm(g, threads);
    if (!db) return;
    share(out, out * rows, threads, [&](int64_t n0, int64_t n1) { sums(dy, n0, n1, db); });
  }

 private:
  template <class F>
  static void share(int64_t items, int64_t work, const Threads& threads, const F& f) {
    const int64_t parts = work < kWorthSharing ? 1 : std::min<int64_t>(threads.count, items);
    const int64_t each = parts ? (items + parts - 1) / parts : 0;
    run_tasks(threads, parts, [&](int64_t part) {
      f(std::min(part * each, items), std::min((part + 1) * each, items));
    });
  }

  // to[k][j] = from[j][k] for k in [k0, k1), j below n.
  void transpose(const T* from, int64_t n, int64_t k0, int64_t k1, T* to) const {
    constexpr int64_t kBlock = 16;
    for (int64_t k = k0; k < k1; k += kBlock) {
      for (int64_t j = 0; j < n; ++j) {
        const int64_t end = std::min(k + kBlock, k1);
        for (int64_t i = k; i < end; ++i) to[i * n + j] = from[j * w_row + i];
      }
    }
  }

  // In leaves of rows, added up in branches: long chains lose digits.
  void sums(const T* dy, int64_t n0, int64_t n1, T* db) const {
    constexpr int64_t kLeaf = 32, kTogether = 256;
    for (int64_t first = n0; first < n1; first += kTogether) {
      const int64_t n = std::min(kTogether, n1 - first);
      T total[kTogether] = {}, branch[kTogether] = {}, leaf[kTogether];
      for (int64_t m = 0; m < rows; m += kLeaf) {
        std::fill_n(leaf, n, T(0));
        for (int64_t i = m; i < std::min(m + kLeaf, rows); ++i) {
          for (int64_t j = 0; j < n; ++j) leaf[j] += dy[i * out + first + j];
        }
        for (int64_t j = 0; j < n; ++j) branch[j] += leaf[j];
        if ((m / kLeaf + 1) % kLeaf) continue;
        for (int64_t j = 0; j < n; ++j) total[j] += branch[j];
        std::fill_n(branch, n, T(0));
      }
      for (int64_t j = 0; j < n; ++j) db[first + j] = total[j] + branch[j];
    }
  }
};

}  // namespace ops
}  // namespace fastseq
