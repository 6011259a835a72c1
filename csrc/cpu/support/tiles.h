// Products of bfloat16 in tiles: Intel's AMX, or the same arithmetic on a machine without it.
//
// A tile is 16 rows of 64 bytes. One instruction, TDPBF16PS, adds to a tile of float32 sums the
// product of a tile of A, 16 rows by 32 k, and one of B, 32 k by 16 columns, the latter in pairs of
// k side by side.
#pragma once

#include <cstdint>

namespace fastseq {

constexpr int kTileRows = 16, kTileDepth = 32, kTileColumns = 16;
// bfloat16 in a tile of A or B.
constexpr int kTileElements = kTileRows * kTileDepth;
// Columns of tiles multiplied together: as many sums as there are registers for.
constexpr int kMostTileColumns = 4;

// Of what a factor is the sum: one bfloat16, or two, hi and lo. Of the product of two such sums all
// but lo * lo is made.
struct TileProduct {
  const uint16_t* a;  // [blocks][parts][16 rows][32 k]
  const uint16_t* b;  // [blocks][columns][parts][16 pairs of k][16 columns][2]
  int64_t blocks;     // of 32 k
  int rows, columns, parts;
  float* out;  // [rows][columns][16]
};
using MultiplyTiles = void (*)(const TileProduct&);

// How the float32 products of a call are made: where `multiply` is null, in float32.
struct Tiles {
  MultiplyTiles multiply;
  int parts;
};

// The way in use, or null: the instructions where machine and system let them run, unless
// FASTSEQ_AMX says "off" or "emulated".
MultiplyTiles multiply_tiles();
// "amx", "emulated" or "off"; and one sentence why.
const char* tiles_name();
const char* tiles_reason();
// True where that way can run; then it is used from now on.
bool use_tiles(const char* name);

}  // namespace fastseq
