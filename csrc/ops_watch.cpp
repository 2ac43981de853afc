// Whether tensors on a CPU are still what they were: by their address and shape, and by a sample of their values.
#ifndef FASTBERT_EMULATED
#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>

#include "tasks.h"
#include "tensors.h"

namespace fastbert {
namespace {

constexpr int64_t kAlone = 2048;  // samples up to here are one thread's

// Elements of one or two dimensions, so many bytes apart.
struct Elements {
  const char* data;
  int64_t row, step;

  explicit Elements(const Tensor& x)
      : data(static_cast<const char*>(x.data_ptr())), row(x.dim() == 2 ? x.stride(0) * size_of(x) : 0),
        step(x.stride(x.dim() - 1) * size_of(x)) {}

  static int64_t size_of(const Tensor& x) { return std::get<0>(element_of(x.scalar_type())); }
};

// Whether `count` elements are the same, without a branch between them: most are in no cache, and are waited for
// together.
template <typename T>
bool same_elements(const char* a, int64_t a_step, const char* b, int64_t b_step, int64_t count) {
  T difference = 0;
  for (int64_t i = 0; i < count; ++i) {
    difference |= *reinterpret_cast<const T*>(a + i * a_step) ^ *reinterpret_cast<const T*>(b + i * b_step);
  }
  return difference == 0;
}

// A view of a sample of a tensor, and what it held.
class Sample {
 public:
  Sample(const Tensor& live, const Tensor& held)
      : live_((check_pair(live, held), live)), held_(held), rows_(live.dim() == 2 ? live.size(0) : 1),
        columns_(live.size(live.dim() - 1)), size_(Elements::size_of(live)) {}

  int64_t count() const { return rows_ * columns_; }

  bool holds() const {
    const auto same = size_ == 1   ? same_elements<uint8_t>
                      : size_ == 2 ? same_elements<uint16_t>
                      : size_ == 4 ? same_elements<uint32_t>
                                   : same_elements<uint64_t>;
    for (int64_t row = 0; row < rows_; ++row) {
      const char *const ours = live_.data + row * live_.row, *const others = held_.data + row * held_.row;
      if (!same(ours, live_.step, others, held_.step, columns_)) return false;
    }
    return true;
  }

 private:
  static void check_pair(const Tensor& live, const Tensor& held) {
    bool alike = live.dim() == held.dim() && live.scalar_type() == held.scalar_type();
    for (int64_t i = 0; alike && i < live.dim(); ++i) alike = live.size(i) == held.size(i);
    check(alike && (live.dim() == 1 || live.dim() == 2), "watch: samples are not pairs of one or two dimensions");
  }

  Elements live_, held_;
  int64_t rows_, columns_, size_;
};

// Where a tensor's elements stand, and what they are.
struct Place {
  const void* data;
  ScalarType dtype;
  std::vector<int64_t> sizes, strides;

  explicit Place(const Tensor& x) : data(x.data_ptr()), dtype(x.scalar_type()) {
    for (int64_t i = 0; i < x.dim(); ++i) {
      sizes.push_back(x.size(i));
      strides.push_back(x.stride(i));
    }
  }

  bool is_of(const Tensor& x) const {
    bool same = x.data_ptr() == data && x.scalar_type() == dtype && x.dim() == static_cast<int64_t>(sizes.size());
    for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == sizes[i] && x.stride(i) == strides[i];
    return same;
  }
};

// Tensors, where they stood, samples of them, and what these held.
class Watch {
 public:
  Watch(const std::vector<Tensor>& tensors, const std::vector<Tensor>& live, const std::vector<Tensor>& held)
      : tensors_(tensors.begin(), tensors.end()), live_(live.begin(), live.end()), held_(held.begin(), held.end()),
        places_(tensors.begin(), tensors.end()) {  // ranges: copies of whole vectors need a newer C++ library
    check(live.size() == held.size(), "watch: samples are not pairs");
    for (size_t i = 0; i < live.size(); ++i) samples_.emplace_back(live[i], held[i]);
    for (const Sample& sample : samples_) count_ += sample.count();
  }

  bool holds() const {
    const auto is_of = [](const Place& place, const Tensor& tensor) { return place.is_of(tensor); };
    if (!std::equal(places_.begin(), places_.end(), tensors_.begin(), is_of)) return false;
    const auto tasks = static_cast<int64_t>(samples_.size());
    const int64_t threads = count_ <= kAlone ? 1 : torch::stable::get_num_threads();
    std::atomic<bool> same{true};
    Team team(threads, 1);
    team.run([&](Team::Member& member) {
      member.step(tasks, [&](int64_t i, int64_t) {
        if (!samples_[i].holds()) same = false;
      });
    });
    return same;
  }

 private:
  std::vector<Tensor> tensors_, live_, held_;  // their memory lives as long
  std::vector<Place> places_;
  std::vector<Sample> samples_;
  int64_t count_ = 0;
};

// All watches, by number.
class Watches {
 public:
  int64_t add(std::shared_ptr<const Watch> watch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    watches_.emplace(++last_, std::move(watch));
    return last_;
  }

  std::shared_ptr<const Watch> get(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = watches_.find(number);
    check(found != watches_.end(), "watch: there is none of this number");
    return found->second;
  }

  void drop(int64_t number) {
    std::shared_ptr<const Watch> last;  // ended without the lock: with it tensors may go, and what waits for them
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = watches_.find(number);
    if (found == watches_.end()) return;
    last = found->second;
    watches_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const Watch>> watches_;
  int64_t last_ = 0;
};

Watches& watches() {
  static auto* const all = new Watches;  // never ended: Python may drop one while the process ends
  return *all;
}

int64_t watch(const std::vector<Tensor>& tensors, const std::vector<Tensor>& live, const std::vector<Tensor>& held) {
  return watches().add(std::make_shared<const Watch>(tensors, live, held));
}

bool watch_holds(int64_t number) { return watches().get(number)->holds(); }

void drop_watch(int64_t number) { watches().drop(number); }

}  // namespace
}  // namespace fastbert

STABLE_TORCH_LIBRARY_FRAGMENT(fastbert_native, m) {
  m.def("watch(Tensor[] tensors, Tensor[] live, Tensor[] held) -> int");
  m.def("watch_holds(int watch) -> bool");
  m.def("drop_watch(int watch) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastbert_native, CompositeExplicitAutograd, m) {
  m.impl("watch", TORCH_BOX(&fastbert::watch));
  m.impl("watch_holds", TORCH_BOX(&fastbert::watch_holds));
  m.impl("drop_watch", TORCH_BOX(&fastbert::drop_watch));
}

#endif
