// Weights as the kernels lay them out, kept from call to call while they hold what they held.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastseq {

// Whose layout it is (an address that stands for a function and its types), of which weights, and
// of what sizes.
struct PackKey {
  const void* layout;
  const void* weights[5];
  int64_t sizes[3];
};

// One call's hold on a packed copy. Weights may be written in ways that leave no trace, so a copy
// is found by their address and used only where `check`, computed from all of their contents, is
// what it was.
class KeptPack {
 public:
  inline __attribute__((always_inline)) KeptPack() {}
  ~KeptPack();
  KeptPack(const KeptPack&) = delete;

  // Returns memory for this call; null where nothing is kept: too large, or another thread was at
  // the table just then.
  char* find(const PackKey& key, uint64_t check, size_t bytes);
  // Whether that memory holds the copy. If not, it is this call's alone, to be filled.
  inline __attribute__((always_inline)) bool filled() const { return filled_; }
  // What has been filled is for others too from now on.
  void publish();

 private:
  struct Hold;
  Hold* hold_ = nullptr;
  bool filled_ = false;
};

}  // namespace fastseq
