#include "tiles.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// The header stands for an assembler that knows the instructions.
#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define FASTSEQ_KNOWS_AMX 1
#endif

namespace fastseq {

namespace {

#if defined(__x86_64__)

// The memory operand of LDTILECFG: of each tile register its bytes a row and its rows.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Registers: sums of up to kMostTileColumns columns from 0 on, hi and lo of A and of B.
constexpr int kA = kMostTileColumns, kALow = kA + 1, kB = kA + 2, kBLow = kA + 3;
constexpr int kRegisters = kA + 4, kRowBytes = 64;
static_assert(kRegisters == 8, "AMX has eight tile registers");

TileShapes shapes_for(int rows) {
  TileShapes shapes;
  for (int i = 0; i < kRegisters; ++i) {
    shapes.bytes[i] = kRowBytes;
    shapes.rows[i] = uint8_t(i < kB ? rows : kTileRows);
  }
  return shapes;
}

// The arithmetic of TDPBF16PS as Intel's manual writes it: of a tile's 32 k the even ones and the
// odd ones are summed up apart, from zero, in float32 multiply-adds rounded to nearest even; the
// two sums are added, and that is added to the tile. Denormals are zero, going in and coming out.
class EmulatedTiles {
 public:
  explicit EmulatedTiles(const TileShapes& shapes) : shapes_(shapes), state_(_mm_getcsr()) {
    // Every exception masked, nearest even, denormals to zero both ways.
    _mm_setcsr(0x9fc0);
  }
  ~EmulatedTiles() { _mm_setcsr(state_); }

  template <int Tile>
  void zero() {
    std::memset(tile_[Tile], 0, sizeof(tile_[Tile]));
  }
  template <int Tile>
  void load(const void* from) {
    std::memcpy(tile_[Tile], from, size_t(shapes_.rows[Tile]) * kRowBytes);
  }
  template <int Tile>
  void store(float* to, int64_t row_bytes) const {
    for (int m = 0; m < shapes_.rows[Tile]; ++m) {
      std::memcpy(reinterpret_cast<char*>(to) + m * row_bytes, tile_[Tile][m], kRowBytes);
    }
  }
  template <int Sum, int A, int B>
  void dot() {
    dot(tile_[Sum], tile_[A], tile_[B], shapes_.rows[Sum]);
  }

 private:
  using Tile = uint32_t[kTileRows][kTileColumns];

  // Never inlined: what floats here must not move past the changes of rounding state.
  __attribute__((target("avx512f"), noinline)) static void dot(Tile& sum, const Tile& a,
                                                               const Tile& b, int rows) {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
    for (int m = 0; m < rows; ++m) {
      __m512 even = _mm512_setzero_ps(), odd = even;
      for (int k = 0; k < kTileDepth / 2; ++k) {
        const __m512i a_k = _mm512_set1_epi32(int(a[m][k])), b_k = _mm512_load_si512(b[k]);
        even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a_k, 16)),
                               _mm512_castsi512_ps(_mm512_slli_epi32(b_k, 16)), even);
        odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a_k, upper)),
                              _mm512_castsi512_ps(_mm512_and_si512(b_k, upper)), odd);
      }
      const __m512 before = _mm512_load_ps(sum[m]);
      _mm512_store_ps(sum[m], _mm512_add_ps(before, _mm512_add_ps(even, odd)));
    }
  }

  alignas(64) Tile tile_[kRegisters];
  TileShapes shapes_;
  unsigned state_;
};

#if defined(FASTSEQ_KNOWS_AMX)
// In assembly, whose registers a template may number; the compiler's own functions take literals.
class AmxTiles {
 public:
  explicit AmxTiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
  // Tiles in use would be saved at every switch of threads.
  ~AmxTiles() { asm volatile("tilerelease"); }

  template <int Tile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
  }
  template <int Tile>
  void load(const void* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t(kRowBytes)), "i"(Tile)
                 : "memory");
  }
  template <int Tile>
  void store(float* to, int64_t row_bytes) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(Tile) : "memory");
  }
  template <int Sum, int A, int B>
  void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
  }
};
#endif

template <class Unit, int Column>
void add_column(Unit& unit, const uint16_t* b, int parts) {
  unit.template load<kB>(b);
  unit.template dot<Column, kA, kB>();
  if (parts == 1) return;
  unit.template load<kBLow>(b + kTileElements);
  unit.template dot<Column, kA, kBLow>();
  unit.template dot<Column, kALow, kB>();
}

template <class Unit, int... Column>
void multiply_columns(const TileProduct& p, std::integer_sequence<int, Column...>) {
  const TileShapes shapes = shapes_for(p.rows);
  Unit unit(shapes);
  const int64_t part = p.parts * kTileElements;
  (unit.template zero<Column>(), ...);
  for (int64_t i = 0; i < p.blocks; ++i) {
    const uint16_t *a = p.a + i * part, *b = p.b + i * p.columns * part;
    unit.template load<kA>(a);
    if (p.parts > 1) unit.template load<kALow>(a + kTileElements);
    (add_column<Unit, Column>(unit, b + Column * part, p.parts), ...);
  }
  (unit.template store<Column>(p.out + Column * kTileColumns, p.columns * kRowBytes), ...);
}

template <class Unit>
void multiply(const TileProduct& p) {
  switch (p.columns) {
    case 1:
      return multiply_columns<Unit>(p, std::make_integer_sequence<int, 1>());
    case 2:
      return multiply_columns<Unit>(p, std::make_integer_sequence<int, 2>());
    case 3:
      return multiply_columns<Unit>(p, std::make_integer_sequence<int, 3>());
    default:
      return multiply_columns<Unit>(p, std::make_integer_sequence<int, kMostTileColumns>());
  }
}

const char* emulation_obstacle() {
  return __builtin_cpu_supports("avx512f") ? nullptr : "the emulation needs AVX-512";
}

#endif

// Why the instructions cannot run; asks Linux for leave to use their registers.
const char* amx_obstacle() {
#if !defined(__x86_64__)
  return "not an x86-64 machine";
#elif !defined(FASTSEQ_KNOWS_AMX)
  return "built for another system than Linux, or by a compiler that does not know AMX";
#else
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTile = 1u << 24, kBfloat16 = 1u << 22, kSystemSaves = 1u << 27;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTile) || !(d & kBfloat16)) {
    return "the CPU has no AMX for bfloat16";
  }
  __get_cpuid(1, &a, &b, &c, &d);
  unsigned saved = 0, high = 0;
  if (c & kSystemSaves) asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  if ((saved & kTileState) != kTileState) return "the system does not save AMX's registers";
  constexpr long kAskLeave = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kAskLeave, kTileData)) return "Linux gives no leave to use AMX";
  return nullptr;
#endif
}

struct Way {
  const char* name;
  MultiplyTiles multiply;
  const char* (*obstacle)();
};

const char* no_obstacle() { return nullptr; }

const Way kWays[] = {
    {"off", nullptr, no_obstacle},
#if defined(__x86_64__)
    {"emulated", multiply<EmulatedTiles>, emulation_obstacle},
#endif
#if defined(FASTSEQ_KNOWS_AMX)
    {"amx", multiply<AmxTiles>, amx_obstacle},
#endif
};

const Way* way_named(const char* name) {
  for (const Way& way : kWays) {
    if (std::strcmp(way.name, name) == 0) return &way;
  }
  return nullptr;
}

struct Active {
  const Way* way = &kWays[0];
  char reason[128];

  Active() {
    const char* wanted = std::getenv("FASTSEQ_AMX");
    if (wanted && *wanted) {
      const Way* named = way_named(wanted);
      const char* obstacle = named ? named->obstacle() : "no such way";
      if (!obstacle) way = named;
      std::snprintf(reason, sizeof(reason), "FASTSEQ_AMX=%.16s%s%s", wanted, obstacle ? ": " : "",
                    obstacle ? obstacle : "");
      return;
    }
    const char* obstacle = amx_obstacle();
    if (!obstacle) way = way_named("amx");
    std::snprintf(reason, sizeof(reason), "%s",
                  obstacle ? obstacle : "the CPU has AMX, and Linux lets it be used");
  }
};

Active& active() {
  static Active instance;
  return instance;
}

}  // namespace

MultiplyTiles multiply_tiles() {
  return __atomic_load_n(&active().way, __ATOMIC_RELAXED)->multiply;
}
const char* tiles_name() { return active().way->name; }
const char* tiles_reason() { return active().reason; }

bool use_tiles(const char* name) {
  const Way* way = way_named(name);
  if (!way || way->obstacle()) return false;
  __atomic_store_n(&active().way, way, __ATOMIC_RELAXED);
  std::snprintf(active().reason, sizeof(active().reason), "set by name");
  return true;
}

}  // namespace fastseq
