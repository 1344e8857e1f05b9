#include "transfers.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <utility>

#include "parcels.h"

namespace fastopt::cuda {
namespace {

// Adds to an error of the device what it was at.
template <class Call>
auto naming(const Parcel& parcel, Call call) {
  try {
    return call();
  } catch (const DeviceError& error) {
    const auto earlier = [](const Piece& a, const Piece& b) { return a.job < b.job; };
    const auto [first, last] = std::minmax_element(parcel.pieces.begin(), parcel.pieces.end(), earlier);
    throw TransferError(error.what(), first->job, last->job);
  }
}

// Note [Rounds]
// The host's threads fill, or empty, several slots at a time, cut among them as any batch is, while the device is at
// the slots of the round before. Rounds to the device begin with one slot and double, so that the bus need not wait for
// the first; a quarter of the ring is the most, so that some are always under way.
constexpr int64_t kRoundsInRing = 4;

class Transfer {
 public:
  Transfer(std::span<const Job> jobs, Direction direction, Ring& ring, Queue& queue, const Host& host)
      : ring_(ring),
        queue_(queue),
        host_(host),
        direction_(direction),
        parcels_(jobs, direction, ring.slot_bytes(), queue) {}

  Transfer(const Transfer&) = delete;
  Transfer& operator=(const Transfer&) = delete;

  // Before the slots are given back: no other may have them while the device is at them.
  ~Transfer() {
    if (!is_done_) {
      queue_.drain();
    }
  }

  std::vector<size_t> run(bool waits) {
    queue_.fork();
    list_pinned();
    if (direction_ == Direction::ToDevice) {
      send();
    } else {
      fetch();
    }
    queue_.join();
    for (const auto& fence : pinned_) {
      if (waits) {
        fence->wait();
      }
    }
    is_done_ = true;
    return waits ? std::vector<size_t>() : std::vector<size_t>(parcels_.pinned().begin(), parcels_.pinned().end());
  }

 private:
  struct Load {
    Slot slot;
    Parcel parcel;
    std::unique_ptr<Fence> fence;  // behind its transfers
  };

  void list_pinned() {
    while (!parcels_.is_done() && !parcels_.next_takes_slot()) {
      const Parcel parcel = parcels_.next();
      list(parcel, parcel.pinned);
    }
    if (!parcels_.pinned().empty()) {
      for (int stream = 0; stream < Queue::kStreams; ++stream) {
        pinned_.push_back(queue_.record(stream));
      }
    }
  }

  void send() {
    std::vector<Job> host_jobs;
    int64_t slots = 1;
    while (!parcels_.is_done()) {
      host_jobs.clear();
      for (Slot& slot : ring_.take(queue_, slots)) {
        if (!parcels_.is_done()) {
          add_host_jobs(loads_.emplace_back(Load{std::move(slot), parcels_.next(), nullptr}), host_jobs);
        }
      }
      fastopt::run(host_jobs, host_.kernels, host_.threads, host_.parallel);
      for (; !loads_.empty(); loads_.pop_front()) {
        Load& load = loads_.front();
        load.slot.release_behind(list(load.parcel, load.slot.data()));
      }
      slots = std::min(2 * slots, slots_of_round());
    }
  }

  void fetch() {
    std::vector<Job> host_jobs;
    while (!parcels_.is_done() || !loads_.empty()) {
      list_loads();
      host_jobs.clear();
      size_t arrived = 0;
      while (arrived < loads_.size() && static_cast<int64_t>(arrived) < slots_of_round() &&
             has_arrived(loads_[arrived], /*waits=*/arrived == 0)) {
        add_host_jobs(loads_[arrived], host_jobs);
        ++arrived;
      }
      fastopt::run(host_jobs, host_.kernels, host_.threads, host_.parallel);
      for (; arrived > 0; --arrived) {
        loads_.pop_front();
      }
    }
  }

  // Has the device fetch what it can for two rounds: one that is being emptied, and one that is under way meanwhile.
  void list_loads() {
    while (!parcels_.is_done() && static_cast<int64_t>(loads_.size()) < 2 * slots_of_round()) {
      const int64_t most = 2 * slots_of_round() - static_cast<int64_t>(loads_.size());
      std::vector<Slot> slots = loads_.empty() ? ring_.take(queue_, most) : ring_.take_free(queue_, most);
      if (slots.empty()) {
        return;
      }
      for (Slot& slot : slots) {
        if (!parcels_.is_done()) {
          Load& load = loads_.emplace_back(Load{std::move(slot), parcels_.next(), nullptr});
          load.fence = list(load.parcel, load.slot.data());
        }
      }
    }
  }

  bool has_arrived(Load& load, bool waits) {
    return naming(load.parcel, [&] {
      if (waits) {
        load.fence->wait();
      }
      return waits || load.fence->is_passed();
    });
  }

  int64_t slots_of_round() const { return std::max<int64_t>(ring_.slots() / kRoundsInRing, 1); }

  void add_host_jobs(const Load& load, std::vector<Job>& host_jobs) const {
    for (const Piece& piece : load.parcel.pieces) {
      host_jobs.push_back(parcels_.on_host(piece, load.slot.data()));
    }
  }

  // Has the device do its part, in the next stream; the fence stands behind the last transfer.
  std::unique_ptr<Fence> list(const Parcel& parcel, char* host_memory) {
    return naming(parcel, [&] {
      stream_ = (stream_ + 1) % Queue::kStreams;
      return parcel.is_shared ? list_shared(parcel, host_memory) : list_owning(parcel, host_memory);
    });
  }

  std::unique_ptr<Fence> list_shared(const Parcel& parcel, char* host_memory) {
    char* staging = queue_.staging(stream_, ring_.slot_bytes());
    std::vector<Job> casts;
    casts.reserve(parcel.pieces.size());
    for (const Piece& piece : parcel.pieces) {
      casts.push_back(parcels_.on_device(piece, staging));
    }
    if (direction_ == Direction::ToHost) {
      queue_.cast(stream_, casts);
      queue_.copy(stream_, host_memory, staging, parcel.bytes, direction_);
      return queue_.record(stream_);
    }
    queue_.copy(stream_, staging, host_memory, parcel.bytes, direction_);
    auto fence = queue_.record(stream_);
    queue_.cast(stream_, casts);
    return fence;
  }

  std::unique_ptr<Fence> list_owning(const Parcel& parcel, char* host_memory) {
    for (const Piece& piece : parcel.pieces) {
      char* host = host_memory + piece.offset;
      char* device = parcels_.place_on_device(piece);
      const bool to_device = direction_ == Direction::ToDevice;
      queue_.copy(stream_, to_device ? device : host, to_device ? host : device, parcels_.bytes_of(piece), direction_);
    }
    return queue_.record(stream_);
  }

  Ring& ring_;
  Queue& queue_;
  const Host& host_;
  const Direction direction_;
  Parcels parcels_;
  std::vector<std::unique_ptr<Fence>> pinned_;  // behind what takes no slot
  std::deque<Load> loads_;                      // filled or under way, in order
  int stream_ = 0;                              // the last one used
  bool is_done_ = false;
};

}  // namespace

std::vector<size_t> transfer(std::span<const Job> jobs, Direction direction, Ring& ring, Queue& queue, const Host& host,
                             bool waits) {
  return Transfer(jobs, direction, ring, queue, host).run(waits);
}

}  // namespace fastopt::cuda
