// AMX's instructions in csrc/cpu/support/tiles.cpp, run as they are compiled: on a machine that has
// them by itself, elsewhere by a handler of the signal that an unknown instruction raises, which
// reads the machine code and does what Intel's manual says, with faults for what it forbids.
// Their results are compared with the emulation's, bit by bit. Prints "same", and by whom they ran.
#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <random>
#include <vector>

#include "../../csrc/cpu/support/tiles.cpp"

#if !defined(FASTSEQ_KNOWS_AMX)
int main() { std::puts("not built"); }
#else

namespace {

struct Registers {
  bool configured = false;
  fastseq::TileShapes shapes;
  uint8_t bytes[8][16][64];
} g;
const char* g_fault = nullptr;
int64_t g_done = 0;

void fault(const char* what) {
  if (!g_fault) g_fault = what;
}

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
float from_bfloat16(const uint8_t* p) {
  uint32_t bits = uint32_t(p[0]) << 16 | uint32_t(p[1]) << 24;
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}

void dot(int to, int a, int b) {
  const uint8_t* rows = g.shapes.rows;
  if (to == a || to == b || a == b) fault("TDPBF16PS with one register twice");
  if (rows[to] != rows[a] || g.shapes.bytes[to] != g.shapes.bytes[b] ||
      g.shapes.bytes[a] != 4 * rows[b]) {
    fault("TDPBF16PS of shapes that do not go together");
  }
  for (int m = 0; m < rows[to]; ++m) {
    for (int n = 0; n < g.shapes.bytes[to] / 4; ++n) {
      float parts[2] = {0, 0};
      for (int k = 0; k < rows[b]; ++k) {
        for (int i = 0; i < 2; ++i) {
          const float x = from_bfloat16(g.bytes[a][m] + 4 * k + 2 * i);
          const float y = from_bfloat16(g.bytes[b][k] + 4 * n + 2 * i);
          parts[i] = flushed(std::fma(x, y, parts[i]));
        }
      }
      float sum;
      std::memcpy(&sum, g.bytes[to][m] + 4 * n, 4);
      sum = flushed(flushed(sum) + flushed(parts[0] + parts[1]));
      std::memcpy(g.bytes[to][m] + 4 * n, &sum, 4);
    }
  }
}

// VEX.128.0F38.W0 with opcodes 49, 4B and 5C; of addresses the forms that a compiler makes.
void on_unknown(int, siginfo_t*, void* context) {
  greg_t* const regs = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  static const int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                 REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                 REG_R12, REG_R13, REG_R14, REG_R15};
  const auto* code = reinterpret_cast<const uint8_t*>(regs[REG_RIP]);
  const auto stop = [](const char* what) {
    std::printf("%s\n", what);
    std::_Exit(3);
  };
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84)) stop("not an AMX instruction");
  const int r = !(code[1] & 0x80), x = !(code[1] & 0x40), b = !(code[1] & 0x20);
  const int v = ~(code[2] >> 3) & 15, pp = code[2] & 3, opcode = code[3], modrm = code[4];
  const int mod = modrm >> 6, reg = (modrm >> 3 & 7) + 8 * r;
  int rm = (modrm & 7) + 8 * b, size = 5;
  char* base = nullptr;
  int64_t stride = 0;
  if (mod != 3) {
    if ((modrm & 7) == 4) {
      const int sib = code[size++], index = (sib >> 3 & 7) + 8 * x;
      rm = (sib & 7) + 8 * b;
      if (mod == 0 && (sib & 7) == 5) stop("an address that is not decoded");
      if (index != 4) stride = int64_t(regs[kOrder[index]]) << (sib >> 6);
    } else if (mod == 0 && (modrm & 7) == 5) {
      stop("an address that is not decoded");
    }
    base = reinterpret_cast<char*>(regs[kOrder[rm]]);
    int32_t offset = 0;
    if (mod == 1) offset = int8_t(code[size++]);
    if (mod == 2) {
      std::memcpy(&offset, code + size, 4);
      size += 4;
    }
    base += offset;
  }
  const bool sets_up = opcode == 0x49 && pp == 0;
  if (!sets_up && !g.configured) fault("a tile used before LDTILECFG or after TILERELEASE");
  if (!sets_up && (reg > 7 || (mod == 3 && opcode == 0x5c && (rm > 7 || v > 7)))) fault("tmm8");
  const int rows = g.shapes.rows[reg & 7], wide = g.shapes.bytes[reg & 7];
  if (opcode == 0x49 && pp == 0 && mod != 3) {
    std::memcpy(&g.shapes, base, 64);
    std::memset(g.bytes, 0, sizeof(g.bytes));
    if (g.shapes.palette != 1 || g.shapes.start_row != 0) fault("LDTILECFG of another palette");
    for (int i = 0; i < 16; ++i) {
      const int most_rows = i < 8 ? 16 : 0, most_bytes = i < 8 ? 64 : 0;
      if (g.shapes.rows[i] > most_rows || g.shapes.bytes[i] > most_bytes) fault("too large a tile");
      if (i < 8 && !(g.shapes.rows[i] && g.shapes.bytes[i])) fault("a tile of nothing");
    }
    for (int i = 0; i < 14; ++i) {
      if (g.shapes.reserved[i]) fault("LDTILECFG with reserved bytes");
    }
    g.configured = true;
  } else if (opcode == 0x49 && pp == 0 && modrm == 0xc0) {
    g.configured = false;
  } else if (opcode == 0x49 && pp == 3 && mod == 3) {
    std::memset(g.bytes[reg], 0, sizeof(g.bytes[reg]));
  } else if (opcode == 0x4b && (pp == 3 || pp == 2) && base) {
    for (int m = 0; m < rows; ++m) {
      if (pp == 3) {
        std::memset(g.bytes[reg][m], 0, 64);
        std::memcpy(g.bytes[reg][m], base + m * stride, size_t(wide));
      } else {
        std::memcpy(base + m * stride, g.bytes[reg][m], size_t(wide));
      }
    }
  } else if (opcode == 0x5c && pp == 2 && mod == 3) {
    dot(reg, rm, v);
  } else {
    stop("an instruction that is not decoded");
  }
  ++g_done;
  regs[REG_RIP] += size;
}

// Denormals, zeros, and numbers of so many powers of two from this one on.
uint16_t draw(std::mt19937& random, uint32_t exponent) {
  const uint32_t sign = (random() & 1) << 15, digits = random() & 0x7f;
  switch (random() % 16) {
    case 0:
    case 1:
      return uint16_t(sign | digits);
    case 2:
      return uint16_t(sign);
    default:
      return uint16_t(sign | (exponent + random() % 14) << 7 | digits);
  }
}

}  // namespace

int main() {
  const bool own = fastseq::amx_obstacle() == nullptr;
  if (!own) {
    struct sigaction action{};
    action.sa_sigaction = on_unknown;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
  }
  std::mt19937 random(1);
  int wrong = 0, products = 0;
  for (int rows : {1, 2, 15, 16}) {
    for (int columns = 1; columns <= fastseq::kMostTileColumns; ++columns) {
      for (int parts = 1; parts <= 2; ++parts, ++products) {
        const int64_t blocks = 1 + products % 3;
        std::vector<uint16_t> a(size_t(blocks * parts * fastseq::kTileElements));
        std::vector<uint16_t> b(a.size() * size_t(columns));
        // Near 1; sums about to be denormal; denormals that would count beside such a factor.
        const uint32_t from[3][2] = {{120, 120}, {55, 55}, {5, 230}};
        const auto& exponents = from[random() % 3];
        for (uint16_t& x : a) x = draw(random, exponents[0]);
        for (uint16_t& x : b) x = draw(random, exponents[1]);
        // A row beyond, which nobody is to write.
        std::vector<float> found(size_t(rows + 1) * size_t(columns) * 16, -7.0f), expected = found;
        fastseq::TileProduct p{a.data(), b.data(), blocks, rows, columns, parts, found.data()};
        fastseq::multiply<fastseq::AmxTiles>(p);
        p.out = expected.data();
        fastseq::multiply<fastseq::EmulatedTiles>(p);
        wrong += std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)) != 0;
      }
    }
  }
  if (g.configured) fault("tiles still in use at the end");
  if (g_fault) std::printf("fault: %s\n", g_fault);
  if (wrong) std::printf("%d of %d products differ\n", wrong, products);
  if (g_fault || wrong) return 1;
  std::printf("same: %d products by %s\n", products, own ? "the CPU" : "the handler");
  return own || g_done > 500 ? 0 : 1;
}
#endif
