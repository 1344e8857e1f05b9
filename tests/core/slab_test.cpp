// Pieces of slabs, filled to their last byte.
#include "slab.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "core_test.h"

namespace core_test {
namespace {

struct Filled {
  fastopt::Piece piece;
  size_t bytes;
  unsigned char content;
};

// Pieces of all sizes, each filled to its last byte; the arena is gone when this returns, and they are not.
std::vector<Filled> filled_pieces(size_t number) {
  fastopt::SlabArena arena;
  std::mt19937 random(5);
  std::vector<Filled> all;
  for (size_t i = 0; i < number; ++i) {
    const size_t bytes = i % 500 == 0 ? fastopt::SlabArena::kLargestPiece : 1 + random() % 3'000;
    all.push_back({arena.take(bytes), bytes, static_cast<unsigned char>(i % 251)});
    std::memset(all.back().piece.data, all.back().content, bytes);
  }
  return all;
}

void check_content(const Filled& filled) {
  const auto* bytes = static_cast<const unsigned char*>(filled.piece.data);
  check(reinterpret_cast<uintptr_t>(bytes) % 64 == 0, "a piece is not aligned to 64 bytes");
  for (size_t i = 0; i < filled.bytes; ++i) {
    check(bytes[i] == filled.content, "byte ", i, " of a piece of ", filled.bytes, " was overwritten");
  }
}

void test_pieces_share_no_byte_and_outlive_their_arena() {
  std::vector<Filled> all = filled_pieces(3'000);
  std::shuffle(all.begin(), all.end(), std::mt19937(2));
  while (!all.empty()) {
    check_content(all.back());
    fastopt::release(all.back().piece.owner);
    all.pop_back();
  }
}

void test_pieces_of_another_alignment_stand_closer() {
  fastopt::SlabArena arena;
  std::vector<fastopt::Piece> all;
  for (const size_t alignment : {size_t{16}, size_t{16}, size_t{64}, size_t{1}}) {
    all.push_back(arena.take(20, alignment));
    check(reinterpret_cast<uintptr_t>(all.back().data) % alignment == 0, "a piece is not aligned to ", alignment);
  }
  const auto* first = static_cast<const char*>(all.front().data);
  check(static_cast<const char*>(all[1].data) == first + 32, "the second piece does not follow the first");
  check(static_cast<const char*>(all[2].data) == first + 64, "the third piece does not follow the second");
  check(static_cast<const char*>(all[3].data) == first + 84, "the fourth piece does not follow the third");
  for (const fastopt::Piece& piece : all) {
    fastopt::release(piece.owner);
  }
}

void test_pieces_are_released_on_many_threads() {
  const std::vector<Filled> all = filled_pieces(2'000);
  run_on_std_threads(4, [&](int64_t thread) {
    for (size_t i = static_cast<size_t>(thread); i < all.size(); i += 4) {
      static_cast<unsigned char*>(all[i].piece.data)[0] += 1;
      fastopt::release(all[i].piece.owner);
    }
  });
}

void test_an_arena_that_gave_nothing_takes_nothing() {
  const fastopt::SlabArena unused;
  fastopt::SlabArena kept_by_nobody;
  fastopt::release(kept_by_nobody.take(1).owner);
}

}  // namespace

std::span<const Test> slab_tests() {
  static constexpr std::array kTests{
      TEST(test_pieces_share_no_byte_and_outlive_their_arena),
      TEST(test_pieces_of_another_alignment_stand_closer),
      TEST(test_pieces_are_released_on_many_threads),
      TEST(test_an_arena_that_gave_nothing_takes_nothing),
  };
  return kTests;
}

}  // namespace core_test
