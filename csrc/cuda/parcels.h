// What of a batch of jobs travels together. Knows no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "../core/run.h"
#include "queue.h"

namespace fastopt::cuda {

// Note [Across the bus]
// The fewer bytes travel: a job is cast before the bus where that makes it smaller and behind it where that makes it
// larger; between dtypes of one size it is the host's, which touches every byte anyway, and so are casts to the device
// that are audited.
//
// A large job that needs no cast on the device has a transfer of its own, between a slot and its place. All others
// share transfers: they lie side by side in a slot, as they do in staging memory on the device, and a batch of launches
// casts between there and their places. Where the host's side of a large job is pinned, and needs no cast on the host,
// the device reads or writes it itself, and no slot is needed.
//
// Where a job has a transfer of its own, what that costs beside its bytes is small: one part in eight of a slot at
// least.
inline constexpr int64_t kOwnTransfersInSlot = 8;

// What shares a transfer begins at multiples of this: what the device's kernels read and write at once.
inline constexpr int64_t kPieceAlignment = 16;

// Small jobs share a slot with so many others at most: a list of them should stay small beside what they are copied
// from.
inline constexpr size_t kMostPieces = 16'000;

inline constexpr int64_t kSmallestSlot = 4 << 10;

// A part of a job, and where it stands on the host: in a slot, or in pinned memory of its own.
struct Piece {
  size_t job;
  int64_t first;  // elements
  int64_t count;
  int64_t offset;  // bytes
};

struct Parcel {
  std::vector<Piece> pieces;
  int64_t bytes = 0;       // up to the end of the last piece
  bool is_shared = false;  // one transfer for all, through staging memory; otherwise one for each piece
  char* pinned = nullptr;  // what the pieces' offsets count from, where they take no slot
};

// The parcels of a batch, one after the other: those first that take no slot.
class Parcels {
 public:
  // The jobs outlive this. None of those to the host is audited.
  Parcels(std::span<const Job> jobs, Direction direction, int64_t slot_bytes, Queue& queue);

  bool is_done() const { return position_ == order_.size(); }

  // Call them only while there are some.
  bool next_takes_slot() const { return position_ >= pinned_; }
  Parcel next();

  // The jobs that take no slot.
  std::span<const size_t> pinned() const { return std::span(order_).first(pinned_); }

  // The host's and the device's part in a piece, for a slot and staging memory at these addresses.
  Job on_host(const Piece& piece, char* slot) const;
  Job on_device(const Piece& piece, char* staging) const;

  // Where a piece stands in its job's memory on the device, and how many bytes of it travel.
  char* place_on_device(const Piece& piece) const;
  int64_t bytes_of(const Piece& piece) const;

 private:
  enum class Way : uint8_t { Pinned, Own, Shared };

  bool casts_on_device(const Job& job) const;
  DType wire_dtype(const Job& job) const;
  Way way_of(const Job& job, Queue& queue) const;
  int64_t elements_in(const Job& job, int64_t bytes) const;

  std::span<const Job> jobs_;
  const Direction direction_;
  const int64_t slot_bytes_;
  std::vector<size_t> order_;  // of jobs with elements: by way, and else as they came
  size_t pinned_ = 0;          // of them at the front
  size_t owning_ = 0;          // and with a transfer of their own
  size_t position_ = 0;
  int64_t first_ = 0;  // element of the job at `position_` that is next
};

}  // namespace fastopt::cuda
