// The loop of a recurrent layer's backward pass: it carries dL/dh and dL/dc only; all weight
// gradients are products over the whole sequence afterwards (deferred.inl).

// What a step needs to know of a row.
template <class T>
struct BackwardRow {
  const T* c_prev;
  const T* h_prev;
  const T* saved;
  const T* dy;    // or null
  const T* dh_n;  // at a row's last step, or null
  const T* dc;
  T* dc_out;
  const T* carry;  // dL/dh other than by W_hh
  T* carry_out;
  const T* masks[kMostMasks];
  const T* keep;  // where zoneout follows a projection: the mask of h
  T* dsums;       // the token's gradient row
  T* hidden;      // h made again, or null
};

template <class T>
struct BackwardTask {
  Share share;
  PanelProduct<T> hh;  // by W_hh
  PanelProduct<T> hr;  // by W_hr
  BackwardRow<T>* rows;
  const T** from;  // gradient row of the later step, of each row
  TiledRows tiled_from;
  TiledColumns tiled_w_hh;
  T* row_scratch;  // of a normalised cell: [2][H], and [rows][H] where h is projected
};

template <class Cell, class T>
struct BackwardLoop {
  using L = LayoutOf<Cell>;
  using Row = GradientRow<Cell>;

  const RecurrentBackward<T>& a;
  int64_t saved_row;
  int64_t dsums_row;  // elements from one token's gradient row to the next
  T* dsums[2];        // [tokens, dsums_row]
  T* hidden[2];  // [tokens, H]: what was multiplied by W_hr, or h where `saved` has it not; or null
  T* dh[2];      // [tokens, P]: dL/dh of all paths, where the cells come in a phase of their own
  T* over_time;  // of a normalised cell: [D, B][kOverTime][H] by sequence, or null
  T* carry;      // [D, B, P] or null
  const T* zero;
  bool defers_dh0;  // whether dL/dh0 by W_hh is left to the deferred products (one_step.inl)

  Walk walk(int d) const { return {a.shape, d == 1}; }
  bool projected() const { return a.weights[0].w_hr != nullptr; }
  // Whether the cells follow in a phase of their own, by_hr() or normalised_step().
  bool in_two_phases() const { return cell::kNormalised<Cell> || projected(); }

  // h of step t, row b, as the forward pass had it.
  const T* h_of(int d, int64_t t, int64_t b) const {
    const RecurrentShape& s = a.shape;
    const int64_t token = s.first[t] + b;
    const T* saved = a.saved + (d * s.tokens + token) * saved_row;
    if (projected()) return saved + Cell::kSaved * s.H;
    if constexpr (Cell::kSavedH >= 0) return saved + Cell::kSavedH * s.H;
    return hidden[d] + token * s.H;
  }
  // h that entered step t of row b.
  const T* h_before(int d, int64_t t, int64_t b) const {
    const RecurrentShape& s = a.shape;
    const Walk w = walk(d);
    if (w.cut(a.resets, t, b)) return zero;
    if (w.follows(t, b)) return h_of(d, w.before(t), b);
    return a.h0 ? a.h0 + (d * s.B + s.sequence(b)) * s.P : zero;
  }

  // Fills in the rows of a step; returns how many there are. At `initial`, the step before the
  // first: every row, and only what leads to h0.
  int64_t prepare(const Share& share, int64_t t, bool initial, BackwardTask<T>& task) {
    const RecurrentShape& s = a.shape;
    const int d = share.d;
    const Walk w = walk(d);
    const int64_t rows = initial ? s.B : s.rows[t];
    const int64_t count = max64(min64(share.b1, rows) - share.b0, 0);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = share.b0 + i, state = d * s.B + s.sequence(b);
      BackwardRow<T>& row = task.rows[i];
      const int64_t later = initial ? w.first(b) : w.after(t);
      const bool last = b >= s.rows_at(later);
      const bool flows = !last && !w.cut(a.resets, later, b);
      task.from[i] =
          flows ? dsums[d] + (s.first[later] + b) * dsums_row + Row::kRecurrent * s.H : zero;
      const bool ends = last && !w.cut_at_end(a.resets, b);
      row.dh_n = ends && a.dh_n ? a.dh_n + state * s.P : nullptr;
      if (carry) {
        row.carry_out = carry + state * s.P;
        row.carry = flows ? row.carry_out : zero;
      }
      if constexpr (Cell::kStates == 2) {
        row.dc_out = a.dc0 + state * s.H;
        row.dc = flows || ends ? row.dc_out : zero;
      }
      if (initial) continue;
      const int64_t token = s.first[t] + b;
      row.saved = a.saved + (d * s.tokens + token) * saved_row;
      row.dy = a.dy.base ? a.dy.at(s, t, b) + d * s.P : nullptr;
      row.dsums = dsums[d] + token * dsums_row;
      row.hidden = hidden[d] ? hidden[d] + token * s.H : nullptr;
      if constexpr (Cell::kReadsH) row.h_prev = h_before(d, t, b);
      if constexpr (Cell::kStates == 2) {
        row.c_prev = w.cut(a.resets, t, b) ? zero
                     : w.follows(t, b)
                         ? a.saved + (d * s.tokens + s.first[w.before(t)] + b) * saved_row +
                               Cell::kSavedC * s.H
                     : a.c0 ? a.c0 + state * s.H
                            : zero;
      }
      for (int k = 0; k < Cell::kMasks; ++k) row.masks[k] = a.masks[d][k].at(s, t, b);
      if constexpr (Cell::kMasks > 0) {
        if (projected()) {
          row.keep = row.masks[0];
          row.h_prev = row.masks[0] = zero;
        }
      }
    }
    return count;
  }

  // dL/dh of the units [unit, unit + lanes) from all paths but the product that `sum` holds.
  FASTSEQ_INLINE Vec<T> add_paths(const BackwardRow<T>& row, int64_t unit, int lanes, Vec<T> sum) {
    if (row.dh_n) sum += load(row.dh_n + unit, lanes);
    if (row.dy) sum += load(row.dy + unit, lanes);
    return sum;
  }

  // The cell's maths for N vectors of units, from dL/dh to the sums and to the step before.
  template <int N>
  FASTSEQ_INLINE void finish(const Together<BackwardRow<T>>& at, int lanes, const T* params,
                             Several<T, N> dh) {
    if constexpr (!cell::kNormalised<Cell>) finish_cell(at, lanes, params, dh);
  }
  template <int N>
  FASTSEQ_INLINE void finish_cell(const Together<BackwardRow<T>>& at, int lanes, const T* params,
                                  Several<T, N> dh) {
    using V = Several<T, N>;
    const int64_t H = a.shape.H;
    V saved[Cell::kSaved], c_prev{}, h_prev{}, dc{}, carried{}, h{};
    V mask[kMostMasks], param[Cell::kParams + 1], dparam[Cell::kParams + 1], dz[L::kSums];
#pragma GCC unroll 8
    for (int i = 0; i < Cell::kSaved; ++i) {
      load_each(saved[i], lanes, [&](int j) { return at.of(at.row(j).saved + i * H, j); });
    }
    const bool carries = Cell::kCarriesH && !projected();
    if (carries) {
      load_each(carried, lanes, [&](int j) { return at.of(at.row(j).carry, j); });
      dh = dh + carried;
    }
    if constexpr (Cell::kReadsH) {
      load_each(h_prev, lanes, [&](int j) { return at.of(at.row(j).h_prev, j); });
    }
    if constexpr (Cell::kStates == 2) {
      load_each(c_prev, lanes, [&](int j) { return at.of(at.row(j).c_prev, j); });
      load_each(dc, lanes, [&](int j) { return at.of(at.row(j).dc, j); });
    }
    for (int i = 0; i < Cell::kMasks; ++i) {
      load_each(mask[i], lanes, [&](int j) { return at.of(at.row(j).masks[i], j); });
    }
    for (int i = 0; i < Cell::kParams; ++i) {
      load_each(param[i], lanes, [&](int j) { return at.of(params + i * H, j); });
    }
    Cell::backward(saved, h_prev, c_prev, param, mask, dh, dc, carried, dz, dparam, h);
    if constexpr (Cell::kStates == 2) {
      store_each(dc, lanes, [&](int j) { return at.of(at.row(j).dc_out, j); });
    }
    if (carries) store_each(carried, lanes, [&](int j) { return at.of(at.row(j).carry_out, j); });
#pragma GCC unroll 4
    for (int i = 0; i < L::kSums; ++i) {
      store_each(dz[i], lanes,
                 [&](int j) { return at.of(at.row(j).dsums + Row::block(i) * H, j); });
    }
    for (int i = 0; i < Cell::kParams; ++i) {
      store_each(dparam[i], lanes,
                 [&](int j) { return at.of(at.row(j).dsums + (L::kSums + i) * H, j); });
    }
    if (at.first->hidden) {
      store_each(h, lanes, [&](int j) { return at.of(at.row(j).hidden, j); });
    }
  }

  // The cells of `rows` rows, for `vectors` vectors of units from `unit` on; sum(m, j) is where the
  // product for row m and vector j lies.
  template <class Sum>
  FASTSEQ_INLINE void finish_tile(const BackwardRow<T>* row, int rows, int64_t unit, int vectors,
                                  const T* params, bool paths, const Sum& sum) {
    const int64_t H = a.shape.H;
    // `first` and, `across`, its neighbours, or the rows below it.
    auto finish_at = [&](auto n, int m, int j, bool across) {
      const Together<BackwardRow<T>> at{row + m, unit + j * kLanes<T>, across};
      const int lanes = int(min64(kLanes<T>, H - at.unit));
      finish(at, lanes, params, Several<T, decltype(n)::value>::each([&](int i) {
               const Vec<T> product = load(across ? sum(m, j + i) : sum(m + i, j));
               return paths ? add_paths(at.row(i), at.unit + (across ? i * kLanes<T> : 0), lanes,
                                        product)
                            : product;
             }));
    };
    if (rows == 1) {
      const int whole = int(min64(vectors, (H - unit) / kLanes<T>));
      several_at_a_time<kTogetherBack>(whole, [&](auto n, int j) { finish_at(n, 0, j, true); });
      if (whole < vectors) finish_at(Const<1>{}, 0, whole, true);
      return;
    }
    for (int j = 0; j < vectors; ++j) {
      several_at_a_time<kTogetherBack>(rows, [&](auto n, int m) { finish_at(n, m, j, false); });
    }
  }

  // dL/dh of step `step` back from the end (step T: of h0), and with it the cells, or where h is
  // projected only dL/dh itself; for a share of the panels of W_hh.
  void by_hh(int64_t step, BackwardTask<T>& task) {
    const RecurrentShape& s = a.shape;
    const Share& share = task.share;
    const int d = share.d;
    const bool initial = step == s.T;
    const int64_t t = initial ? (d ? s.T : -1) : walk(d).time(s.T - 1 - step);
    const int64_t count = prepare(share, t, initial, task);
    const PanelProduct<T>& product = task.hh;
    alignas(64) T sums[kRows * 2 * kPanel<T>];
    const bool tiled = kTiled<T> && task.tiled_from.by.multiply;
    const int64_t tiles = ceil_div(count, tiled ? kTileRows : kRows);
    const int most = count ? int(ceil_div(count, tiles)) : 1;
    if constexpr (kTiled<T>) {
      for (int64_t i = 0; tiled && i < tiles; ++i) {
        const int64_t b = count * i / tiles;
        task.tiled_from.fill(i, task.from + b, int(count * (i + 1) / tiles - b));
      }
    }
    // To and fro, as the forward pass goes.
    const bool odd = step % 2 == 1, back = odd && 2 * most > kRows;
    for (int64_t done = 0, n = 0; done < share.g1 - share.g0; done += n) {
      const int64_t p = back ? share.g1 - 1 - done : share.g0 + done;
      n = back || tiled ? 1 : product.together(most, p, share.g1);
      const int wide = product.vectors(p);
      const int64_t unit = p * kPanel<T>;
      int64_t b = 0;
      for (int64_t i = 0; i < tiles; ++i) {
        const int rows = int((count * (i + 1)) / tiles - (count * i) / tiles);
        int flowing = 0;
        for (int m = 0; m < rows; ++m) flowing += task.from[b + m] != zero;
        const bool any = flowing > 0;
        if (!tiled) product.sums(p, int(n), rows, task.from + b, any, int(i), odd, sums);
        if constexpr (kTiled<T>) {
          if (tiled) {
            sums_by_tiles(product, p, i, rows, task.from + b, any, task.tiled_from,
                          task.tiled_w_hh.group(p), sums);
          }
        }
        auto sum = [&](int m, int j) {
          return sums + (((j / wide) * rows + m) * wide + j % wide) * kLanes<T>;
        };
        // Where nothing flows there is nothing, whatever the weights: zero times NaN is not zero.
        for (int m = 0; any && flowing < rows && m < rows; ++m) {
          if (task.from[b + m] != zero) continue;
          for (int j = 0; j < int(n) * wide; ++j) store(sum(m, j), Vec<T>{});
        }
        const BackwardRow<T>* row = task.rows + b;
        if (!initial && !in_two_phases()) {
          finish_tile(row, rows, unit, int(n) * wide, a.weights[d].params, true, sum);
        } else {
          for (int j = 0; j < int(n) * wide; ++j) {
            const int64_t column = unit + j * kLanes<T>;
            const int lanes = int(min64(kLanes<T>, s.P - column));
            for (int m = 0; m < rows; ++m) {
              const int64_t at = share.b0 + b + m;
              if (initial) {
                store_initial(row[m], d, at, column, lanes, load(sum(m, j)));
              } else {
                Vec<T> all = add_paths(row[m], column, lanes, load(sum(m, j)));
                if constexpr (Cell::kMasks > 0) all = keep_part(row[m], column, lanes, all);
                store(dh[d] + (s.first[t] + at) * s.P + column, all, lanes);
              }
            }
          }
        }
        b += rows;
      }
    }
  }

  // Zoneout after a projection: of dL/dh, what the step before gets at once; returns the rest.
  FASTSEQ_INLINE Vec<T> keep_part(const BackwardRow<T>& row, int64_t unit, int lanes, Vec<T> dh) {
    const Vec<T> keep = load(row.keep + unit, lanes);
    dh += load(row.carry + unit, lanes);
    store(row.carry_out + unit, keep * dh, lanes);
    return (T(1) - keep) * dh;
  }

  FASTSEQ_INLINE void store_initial(const BackwardRow<T>& row, int d, int64_t b, int64_t unit,
                                    int lanes, Vec<T> sum) {
    const RecurrentShape& s = a.shape;
    if (row.dh_n) sum += load(row.dh_n + unit, lanes);
    if constexpr (Cell::kCarriesH) sum += load(row.carry + unit, lanes);
    store(a.dh0 + (d * s.B + s.sequence(b)) * s.P + unit, sum, lanes);
    if constexpr (Cell::kStates == 2) {
      // A reset: nothing reaches the initial cell state either.
      if (row.dc == zero && unit == 0) {
        for (int64_t u = 0; u < s.H; ++u) row.dc_out[u] = 0;
      }
    }
  }

  // The cells of a step where h is projected, from dL/dh; for a share of the panels of W_hr.
  void by_hr(int64_t step, BackwardTask<T>& task) {
    const RecurrentShape& s = a.shape;
    const Share& share = task.share;
    const int d = share.d;
    const int64_t t = walk(d).time(s.T - 1 - step);
    const int64_t count = max64(min64(share.b1, s.rows[t]) - share.b0, 0);
    for (int64_t i = 0; i < count; ++i) {
      task.from[i] = dh[d] + (s.first[t] + share.b0 + i) * s.P;
    }
    const PanelProduct<T>& product = task.hr;
    alignas(64) T sums[kRows * 2 * kPanel<T>];
    const int64_t tiles = ceil_div(count, kRows);
    const int most = count ? int(ceil_div(count, tiles)) : 1;
    for (int64_t p = share.p0, n = 0; p < share.p1; p += n) {
      n = product.together(most, p, share.p1);
      const int wide = product.vectors(p);
      int64_t b = 0;
      for (int64_t i = 0; i < tiles; ++i) {
        const int rows = int((count * (i + 1)) / tiles - (count * i) / tiles);
        product.sums(p, int(n), rows, task.from + b, true, int(i), false, sums);
        auto sum = [&](int m, int j) {
          return sums + (((j / wide) * rows + m) * wide + j % wide) * kLanes<T>;
        };
        finish_tile(task.rows + b, rows, p * kPanel<T>, int(n) * wide, a.weights[d].params, false,
                    sum);
        b += rows;
      }
    }
  }
};
