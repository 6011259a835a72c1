// Factors of products by tiles of bfloat16 (support/tiles.h), from float32.
//
// A float32 x is hi + lo and a rest of at most 2^-18 |x|: hi is the bfloat16 nearest to x, lo the
// one nearest to x - hi. Where a factor has one part it is hi alone. Source: Henry, Tang and
// Heinecke 2019, Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
// Computations.
//
// What has no such parts, infinities and NaN, and what is so large that a product of parts might
// overflow or cancel where that of float32 does not, is multiplied in float32: a row of A and a
// panel of B each answer for themselves, so that no result depends on what else is in a tile.

template <class T>
constexpr bool kTiled = std::is_same<T, float>::value && kLanes<T> == kTileColumns;
// 2^63: products of what is smaller are finite.
constexpr uint32_t kUnfit = 0x5f000000;

// A product whose sums are shorter is made in float32: half of a tile would be padding.
constexpr int64_t kFewestTiled = kTileDepth / 2;

inline int64_t tile_blocks(int64_t K) { return ceil_div(K, kTileDepth); }
// Elements of one tile of rows, or of so many columns of tiles, K deep.
inline int64_t tiled_size(const Tiles& by, int64_t K, int64_t columns = 1) {
  return by.multiply ? tile_blocks(K) * columns * by.parts * kTileElements : 0;
}

typedef uint32_t Bits __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(FASTSEQ_VECTOR_BYTES / 2), aligned(2)));

// A bfloat16 each, in the upper halves of lanes; and the largest of what they were made from.
struct Parts {
  Bits hi, lo;
};
FASTSEQ_INLINE Bits nearest_bfloat16(Bits x) {
  return (x + 0x7fffu + ((x >> 16) & 1u)) & 0xffff0000u;
}
FASTSEQ_INLINE Parts parts_of(VecF x, Bits& largest) {
  const Bits bits = Bits(x), size = bits & 0x7fffffffu;
  largest = size > largest ? size : largest;
  const Bits hi = nearest_bfloat16(bits);
  return {hi, nearest_bfloat16(Bits(x - VecF(hi)))};
}
FASTSEQ_INLINE bool fits(Bits largest) {
  uint32_t most = 0;
  for (int i = 0; i < kLanes<float>; ++i) most = largest[i] > most ? largest[i] : most;
  return most < kUnfit;
}

// Lanes [k, k + lanes) of row m of a tile of rows.
FASTSEQ_INLINE void store_parts(Parts x, const Tiles& by, int m, int64_t k, uint16_t* tiles) {
  uint16_t* to = tiles + (k / kTileDepth) * by.parts * kTileElements + m * kTileDepth;
  to += k % kTileDepth;
  *reinterpret_cast<HalfBits*>(to) = __builtin_convertvector(x.hi >> 16, HalfBits);
  if (by.parts == 1) return;
  *reinterpret_cast<HalfBits*>(to + kTileElements) = __builtin_convertvector(x.lo >> 16, HalfBits);
}

// `count` rows, K wide, to tiles [blocks][parts][16][32]. Returns a bit for each that does not fit.
template <class T>
uint32_t tile_rows(const T* const* rows, int count, int64_t K, const Tiles& by, uint16_t* tiles) {
  uint32_t unfit = 0;
  for (int m = 0; m < count; ++m) {
    Bits largest{};
    for (int64_t k = 0; k < tile_blocks(K) * kTileDepth; k += kLanes<T>) {
      const Vec<T> x = k < K ? load(rows[m] + k, int(min64(K - k, kLanes<T>))) : Vec<T>{};
      store_parts(parts_of(x, largest), by, m, k, tiles);
    }
    if (!fits(largest)) unfit |= 1u << m;
  }
  return unfit;
}

// A column of a panel in float32, `stride` elements from one k to the next, to column `column` of
// tiles [blocks][columns][parts][16 pairs of k][16][2]. Returns whether it fits.
template <class T>
bool tile_column(const T* from, int64_t stride, int64_t K, int column, int columns, const Tiles& by,
                 uint16_t* tiles) {
  Bits largest{};
  for (int64_t k = 0; k < tile_blocks(K) * kTileDepth; k += 2) {
    const Parts first = parts_of(k < K ? load(from + k * stride) : Vec<T>{}, largest);
    const Parts second = parts_of(k + 1 < K ? load(from + (k + 1) * stride) : Vec<T>{}, largest);
    uint16_t* to = tiles + ((k / kTileDepth) * columns + column) * by.parts * kTileElements;
    to += k % kTileDepth * kTileColumns;
    *reinterpret_cast<Bits*>(to) = first.hi >> 16 | second.hi;
    if (by.parts == 1) continue;
    *reinterpret_cast<Bits*>(to + kTileElements) = first.lo >> 16 | second.lo;
  }
  return fits(largest);
}

// Rows of A that several panels multiply, a tile of rows after the other.
struct TiledRows {
  Tiles by;
  int64_t K;
  uint16_t* tiles;  // [tiles of rows][blocks][parts][16][32]
  uint32_t* unfit;  // of each tile of rows, a bit a row

  template <class Memory>
  static TiledRows take(Memory& memory, const Tiles& by, int64_t K, int64_t rows) {
    const int64_t count = by.multiply ? ceil_div(rows, kTileRows) : 0;
    return {by, K, memory.template take<uint16_t>(size_t(count * tiled_size(by, K))),
            memory.template take<uint32_t>(size_t(count))};
  }
  template <class T>
  void fill(int64_t i, const T* const* rows, int count) const {
    if (by.multiply) unfit[i] = tile_rows(rows, count, K, by, tiles + i * tiled_size(by, K));
  }
  void multiply(int64_t i, int rows, const uint16_t* b, int columns, float* out) const {
    by.multiply({tiles + i * tiled_size(by, K), b, tile_blocks(K), rows, columns, by.parts, out});
  }
};

// Groups of packed weights, K deep and `columns` wide (the last perhaps less), as tiles.
struct TiledColumns {
  Tiles by;
  int64_t K;
  int columns;
  uint16_t* tiles;  // [groups][blocks][columns][parts][16 pairs of k][16][2]
  bool* fits;       // of each group; where false, products are made in float32

  template <class Memory>
  static TiledColumns take(Memory& memory, const Tiles& by, int64_t K, int columns,
                           int64_t groups) {
    const int64_t size = groups * tiled_size(by, K, columns);
    return {by, K, columns, memory.template take<uint16_t>(size_t(size)),
            memory.template take<bool>(size_t(by.multiply ? groups : 0))};
  }
  // Null where the group is multiplied in float32.
  const uint16_t* group(int64_t g) const {
    return by.multiply && fits[g] ? tiles + g * tiled_size(by, K, columns) : nullptr;
  }
  // From panels of `wide` vectors of columns, [panels][K][wide][lanes].
  template <class T>
  void fill(int64_t g, const T* panels, int wide, int count) const {
    if (!by.multiply) return;
    fits[g] = true;
    for (int v = 0; v < count; ++v) {
      const T* column = panels + (v / wide) * K * wide * kLanes<T> + v % wide * kLanes<T>;
      fits[g] &= tile_column(column, wide * kLanes<T>, K, v, count, by,
                             tiles + g * tiled_size(by, K, columns));
    }
  }
};
