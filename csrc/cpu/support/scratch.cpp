#include "scratch.h"

#include <cstdlib>
#include <new>

namespace fastseq {

namespace {

// What a thread may keep between calls; larger blocks go back at once.
constexpr size_t kKeep = size_t(32) << 20;

struct Kept {
  char* block = nullptr;
  size_t bytes = 0;
  ~Kept() { std::free(block); }
};
thread_local Kept kept;

}  // namespace

Scratch::Scratch(size_t bytes) : bytes_(padded(bytes ? bytes : 1)) {
  // Taken out of `kept`, so that a nested call gets a block of its own.
  if (kept.bytes >= bytes_) {
    block_ = kept.block;
    bytes_ = kept.bytes;
    kept.block = nullptr;
    kept.bytes = 0;
  } else {
    block_ = static_cast<char*>(std::aligned_alloc(kAlignment, bytes_));
    if (!block_) throw std::bad_alloc();
  }
  next_ = block_;
}

Scratch::~Scratch() {
  if (bytes_ > kKeep || kept.bytes >= bytes_) {
    std::free(block_);
    return;
  }
  std::free(kept.block);
  kept.block = block_;
  kept.bytes = bytes_;
}

}  // namespace fastseq
