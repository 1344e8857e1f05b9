#include "parcels.h"

#include <algorithm>
#include <array>

namespace fastopt::cuda {
namespace {

constexpr int64_t kCutElements =
    64;  // jobs are cut at multiples of this, which keeps both sides as aligned as they are

int64_t aligned(int64_t offset) {
  return (offset + kPieceAlignment - 1) / kPieceAlignment * kPieceAlignment;
}

// Between equal dtypes bytes are moved.
Job job_from(const void* src, DType src_dtype, void* dst, DType dst_dtype, int64_t count) {
  if (src_dtype == dst_dtype) {
    return {src, dst, count * size_of(src_dtype), DType::Byte, DType::Byte};
  }
  return {src, dst, count, src_dtype, dst_dtype};
}

const char* src_at(const Job& job, int64_t element) {
  return static_cast<const char*>(job.src) + element * size_of(job.src_dtype);
}

char* dst_at(const Job& job, int64_t element) {
  return static_cast<char*>(job.dst) + element * size_of(job.dst_dtype);
}

}  // namespace

Parcels::Parcels(std::span<const Job> jobs, Direction direction, int64_t slot_bytes, Queue& queue)
    : jobs_(jobs), direction_(direction), slot_bytes_(slot_bytes) {
  std::vector<size_t> shared;
  std::vector<size_t> owning;
  for (size_t i = 0; i < jobs.size(); ++i) {
    if (jobs[i].count == 0) {
      continue;
    }
    switch (way_of(jobs[i], queue)) {
      case Way::Pinned:
        order_.push_back(i);
        break;
      case Way::Own:
        owning.push_back(i);
        break;
      case Way::Shared:
        shared.push_back(i);
        break;
    }
  }
  pinned_ = order_.size();
  owning_ = owning.size();
  order_.insert(order_.end(), owning.begin(), owning.end());
  order_.insert(order_.end(), shared.begin(), shared.end());
}

bool Parcels::casts_on_device(const Job& job) const {
  const int64_t src = size_of(job.src_dtype);
  const int64_t dst = size_of(job.dst_dtype);
  return direction_ == Direction::ToDevice ? src < dst && job.audit == nullptr : dst < src;
}

DType Parcels::wire_dtype(const Job& job) const {
  return casts_on_device(job) == (direction_ == Direction::ToDevice) ? job.src_dtype : job.dst_dtype;
}

Parcels::Way Parcels::way_of(const Job& job, Queue& queue) const {
  const bool on_device = casts_on_device(job);
  const int64_t bytes = job.count * size_of(wire_dtype(job));
  if (bytes < slot_bytes_ / kOwnTransfersInSlot) {
    return Way::Shared;
  }
  const bool on_host = job.src_dtype != job.dst_dtype && !on_device;
  const void* host = direction_ == Direction::ToDevice ? job.src : job.dst;
  if (!on_host && job.file == kNoFile && queue.is_pinned(host, bytes)) {
    return Way::Pinned;
  }
  return on_device ? Way::Shared : Way::Own;
}

// As many elements of what is left of the job as travel in so many bytes.
int64_t Parcels::elements_in(const Job& job, int64_t bytes) const {
  const int64_t left = job.count - first_;
  const int64_t room = std::max<int64_t>(bytes, 0) / size_of(wire_dtype(job));
  return left <= room ? left : room / kCutElements * kCutElements;
}

Parcel Parcels::next() {
  Parcel parcel;
  const bool takes_slot = next_takes_slot();
  parcel.is_shared = takes_slot ? position_ >= pinned_ + owning_ : casts_on_device(jobs_[order_[position_]]);
  const size_t end = parcel.is_shared || !takes_slot ? order_.size() : pinned_ + owning_;
  const size_t most = takes_slot ? kMostPieces : 1;
  while (position_ < end && parcel.pieces.size() < most) {
    const Job& job = jobs_[order_[position_]];
    const int64_t offset = aligned(parcel.bytes);
    const bool is_whole = !takes_slot && !parcel.is_shared;
    const int64_t count = is_whole ? job.count : elements_in(job, slot_bytes_ - offset);
    if (count == 0) {
      break;
    }
    parcel.pieces.push_back({order_[position_], first_, count, offset});
    parcel.bytes = offset + count * size_of(wire_dtype(job));
    if (!takes_slot) {
      parcel.pinned = direction_ == Direction::ToDevice ? const_cast<char*>(src_at(job, first_)) : dst_at(job, first_);
    }
    first_ += count;
    if (first_ == job.count) {
      first_ = 0;
      ++position_;
    }
  }
  return parcel;
}

Job Parcels::on_host(const Piece& piece, char* slot) const {
  const Job& job = jobs_[piece.job];
  const DType wire = wire_dtype(job);
  if (direction_ == Direction::ToHost) {
    return job_from(slot + piece.offset, wire, dst_at(job, piece.first), job.dst_dtype, piece.count);
  }
  Job part = job_from(src_at(job, piece.first), job.src_dtype, slot + piece.offset, wire, piece.count);
  part.audit = job.audit;
  part.is_given = job.is_given;
  part.file = job.file;
  part.file_offset = job.file_offset + piece.first * size_of(job.src_dtype);
  return part;
}

Job Parcels::on_device(const Piece& piece, char* staging) const {
  const Job& job = jobs_[piece.job];
  const DType wire = wire_dtype(job);
  if (direction_ == Direction::ToHost) {
    return job_from(src_at(job, piece.first), job.src_dtype, staging + piece.offset, wire, piece.count);
  }
  return job_from(staging + piece.offset, wire, dst_at(job, piece.first), job.dst_dtype, piece.count);
}

char* Parcels::place_on_device(const Piece& piece) const {
  const Job& job = jobs_[piece.job];
  return direction_ == Direction::ToDevice ? dst_at(job, piece.first) : const_cast<char*>(src_at(job, piece.first));
}

int64_t Parcels::bytes_of(const Piece& piece) const {
  return piece.count * size_of(wire_dtype(jobs_[piece.job]));
}

}  // namespace fastopt::cuda
