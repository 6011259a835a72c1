#include "kept.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "scratch.h"

namespace fastseq {

namespace {

struct Block {
  char* const first;
  const size_t bytes;
  explicit Block(size_t n) : first(allocate(n)), bytes(n) {}
  ~Block() { std::free(first); }
  Block(const Block&) = delete;
};

// Of all packed copies together; those not used for longest go first.
constexpr size_t kMost = size_t(64) << 20;

struct Entry {
  PackKey key;
  uint64_t check, used;
  std::shared_ptr<Block> block;
};
struct Table {
  std::mutex mutex;
  std::vector<Entry> entries;
  uint64_t calls = 0;

  Entry* find(const PackKey& key) {
    for (Entry& entry : entries) {
      if (std::memcmp(&entry.key, &key, sizeof(key)) == 0) return &entry;
    }
    return nullptr;
  }
};
// Never destroyed: a thread may still be at work while the process ends.
Table& table() {
  static Table* const instance = new Table;
  return *instance;
}

}  // namespace

struct KeptPack::Hold {
  PackKey key;
  uint64_t check;
  std::shared_ptr<Block> block;
};

KeptPack::~KeptPack() { delete hold_; }

char* KeptPack::find(const PackKey& key, uint64_t check, size_t bytes) {
  if (bytes > kMost / 2) return nullptr;
  std::shared_ptr<Block> block;
  {
    Table& t = table();
    // Not waited for: a process forked meanwhile would wait for ever.
    std::unique_lock<std::mutex> lock(t.mutex, std::try_to_lock);
    if (!lock) return nullptr;
    if (Entry* entry = t.find(key)) {
      entry->used = ++t.calls;
      filled_ = entry->check == check && entry->block->bytes == bytes;
      if (filled_) {
        block = entry->block;
      } else {
        // Of what the weights were before: its memory serves again, unless another call reads it.
        std::shared_ptr<Block> old = std::move(entry->block);
        *entry = std::move(t.entries.back());
        t.entries.pop_back();
        if (old.use_count() == 1 && old->bytes == bytes) {
          std::atomic_thread_fence(std::memory_order_acquire);
          block = std::move(old);
        }
      }
    }
  }
  if (!block) block = std::make_shared<Block>(bytes);
  hold_ = new Hold{key, check, std::move(block)};
  return hold_->block->first;
}

void KeptPack::publish() {
  if (!hold_ || filled_) return;
  Table& t = table();
  std::unique_lock<std::mutex> lock(t.mutex, std::try_to_lock);
  if (!lock) return;
  // Another call may have published the same meanwhile.
  if (Entry* entry = t.find(hold_->key)) {
    *entry = {hold_->key, hold_->check, ++t.calls, hold_->block};
    return;
  }
  size_t total = hold_->block->bytes;
  for (const Entry& entry : t.entries) total += entry.block->bytes;
  while (total > kMost) {
    auto oldest = std::min_element(t.entries.begin(), t.entries.end(),
                                   [](const Entry& a, const Entry& b) { return a.used < b.used; });
    total -= oldest->block->bytes;
    *oldest = std::move(t.entries.back());
    t.entries.pop_back();
  }
  t.entries.push_back({hold_->key, hold_->check, ++t.calls, hold_->block});
}

}  // namespace fastseq
