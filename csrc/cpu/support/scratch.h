// Scratch memory of one kernel call, kept by the thread that called for its next call.
#pragma once

#include <cstddef>

namespace fastseq {

// On huge pages where there is use for them; std::free gives it back. Throws std::bad_alloc.
char* allocate(size_t bytes);

// Hands memory out in order.
class Handout {
 public:
  static constexpr size_t kAlignment = 64;

  explicit inline __attribute__((always_inline)) Handout(char* first) : next_(first) {}
  // The next n elements, uninitialised, on a 64-byte boundary.
  template <class T>
  inline __attribute__((always_inline)) T* take(size_t n) {
    char* p = next_;
    next_ += padded(n * sizeof(T));
    return reinterpret_cast<T*>(p);
  }
  static constexpr size_t padded(size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

 protected:
  char* next_;
};

class Scratch : public Handout {
 public:
  // Room for `bytes`; take() hands it out. Throws std::bad_alloc.
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  char* block_;
  size_t bytes_;
};

// Counts what take() would hand out, for a Scratch of just that size: the same function lays memory
// out with the one and then with the other.
class ScratchSize {
 public:
  template <class T>
  inline __attribute__((always_inline)) T* take(size_t n) {
    bytes_ += Handout::padded(n * sizeof(T));
    return nullptr;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

}  // namespace fastseq
