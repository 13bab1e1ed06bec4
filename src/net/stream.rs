//! A panel of an image streams through the network: every layer goes as far as the layer before it
//! allows, and keeps no more rows than the next one needs, so that memory does not grow with the
//! height of the image and no row is computed twice.
//!
//! A thread without work takes it from the last layer that has some: what was just written is read
//! again while it is in the cache, and no thread waits for a layer to be complete.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::layers::{Conv, Layer};
use super::rings::{Ring, Shared};
use super::{NetError, Network};
use crate::kernels::blocked::{First, GateWeights, Gated, Last, Sink, padding};
use crate::kernels::winograd::{Convolve, EXTENT, TILE};
use crate::ops::scratch::Scratch;
use crate::parallel::{self, Threads};
use crate::simd;

/// Rows of a task: whole tiles of the convolutions and, of 3 or 4 rows, of the gates. Of 8, 16 and 32 rows, before gates
/// had tiles, 16 took as long as 8 and twice the memory, 32 longer (gray-sigma25 at 321 × 481, Zen 4, 1 and 2
/// threads, four interleaved rounds).
const STEP: usize = 3 * TILE;
/// Tiles of a row of a task, about: with a layer's weights, their transforms fit the second-level
/// cache. 16 and 48 take up to a tenth longer than 24 and 32 (as above).
const CHUNK: usize = 32;
/// From one question whether to go on to the next.
const PAUSE: Duration = Duration::from_millis(100);
/// More than there are threads.
const WORKERS: usize = 1024;

/// Splits a row of tiles into chunks of [`CHUNK`] or up to half more: columns of each. No halo reaches
/// beyond the chunk beside its own, which is all that [`Flow::done_around`] looks at.
fn chunks(width: usize, halo: usize) -> Vec<Range<usize>> {
    let (tiles, chunk) = (width.div_ceil(TILE), CHUNK.max(2 * halo.div_ceil(TILE)));
    let count = ((tiles + chunk / 2 - 1) / chunk).max(1);
    let edge = |i: usize| (tiles * i / count * TILE).min(width);
    (0..count).map(|i| edge(i)..edge(i + 1)).collect()
}

/// What is done to the rows of an image on their way.
#[derive(Clone, Copy)]
enum Work<'a> {
    Convolve(&'a Layer),
    Gate(&'a GateWeights),
    /// The last convolution, and its sum with the image.
    Finish,
}

/// Works in their order: each reads what the one before writes.
fn works(network: &Network) -> Vec<Work<'_>> {
    let of = |layer| [Some(Work::Convolve(layer)), layer.unit.as_ref().map(Work::Gate)];
    network.layers.iter().flat_map(of).flatten().chain([Work::Finish]).collect()
}

impl Work<'_> {
    /// Rows and columns around an output that it reads.
    fn halo(&self, network: &Network) -> usize {
        match self {
            Work::Convolve(_) => 1,
            Work::Gate(unit) => unit.k() / 2,
            Work::Finish => network.tail.k() / 2,
        }
    }

    /// Columns of padding that it reads of the image's sides.
    fn pad(&self, network: &Network) -> usize {
        match self {
            Work::Convolve(_) | Work::Finish => self.halo(network),
            Work::Gate(_) => 0,
        }
    }

    /// Channels of what it writes.
    fn outputs(&self, before: usize) -> usize {
        match self {
            Work::Convolve(layer) => layer.conv.outputs(),
            Work::Gate(_) | Work::Finish => before,
        }
    }
}

/// Rows that are kept for a reader with this halo: what a step of it reads, while another is written.
fn kept_rows(halo: usize) -> usize {
    2 * STEP + halo.next_multiple_of(STEP) + halo
}

/// The bytes that a panel takes for each of its columns.
pub(super) fn bytes_per_column(network: &Network) -> usize {
    let (mut channels, mut bytes) = (0, 0);
    for (i, work) in works(network).iter().enumerate() {
        if i > 0 {
            bytes += Ring::bytes(kept_rows(work.halo(network)), channels);
        }
        channels = work.outputs(channels);
    }
    bytes
}

/// The rings of a panel, for the next one of the same extents: most of what fresh memory costs is that
/// the system clears it page by page, 6 % of the time of an image of 321 × 481.
#[derive(Debug)]
pub(super) struct Spare {
    /// Rows of the image and columns of the panel.
    extents: [usize; 2],
    rings: Vec<Ring>,
}

/// The most bytes that are kept: of more, there are more rows to share the cost.
const KEPT: usize = 128 << 20;

/// How far a work is in a chunk of the columns.
#[derive(Clone, Copy, Default)]
struct Front {
    /// Rows.
    done: usize,
    /// Whether somebody is at the next ones.
    busy: bool,
}

struct State {
    /// (works, chunks)
    fronts: Vec<Front>,
    /// When to take no more tasks, and pause.
    until: Instant,
    failed: bool,
}

/// Columns of an image: those to yield, and those to compute them from.
pub(super) struct Panel {
    pub(super) core: Range<usize>,
    pub(super) region: Range<usize>,
}

/// An image, (channels, height, width), and where its result goes.
pub(super) struct Job<'a> {
    pub(super) image: &'a [f32],
    pub(super) shape: [usize; 3],
    pub(super) clean: &'a mut [f32],
    pub(super) threads: Threads,
}

impl Job<'_> {
    /// Computes a panel. Tells `goes_on` the rows done, and stops if it says so.
    pub(super) fn panel(
        &mut self,
        network: &Network,
        panel: &Panel,
        mut goes_on: impl FnMut(usize) -> bool,
    ) -> Result<(), NetError> {
        let ([_, height, _], width) = (self.shape, panel.region.len());
        let lanes = simd::selected_lanes::<f32>();
        let works = works(network);
        // Padding and what lies above and below are zeros that nobody writes to.
        let spare = network.spare.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut spare =
            spare.filter(|spare| spare.extents == [height, width]).unwrap_or_else(|| {
                let mut channels = 0;
                let ring = |pair: &[Work<'_>]| {
                    let (kept, pad) = (kept_rows(pair[1].halo(network)), pair[1].pad(network));
                    channels = pair[0].outputs(channels);
                    Ring::new(kept, [channels, height, width], pad, lanes)
                };
                Spare { extents: [height, width], rings: works.windows(2).map(ring).collect() }
            });
        let halos: Vec<_> = works.iter().map(|work| work.halo(network)).collect();
        let chunks = chunks(width, halos.iter().copied().max().unwrap_or(0));
        let fronts = vec![Front::default(); works.len() * chunks.len()];
        let flow = Flow {
            network,
            panel,
            image: self.image,
            shape: self.shape,
            clean: Mutex::new(&mut *self.clean),
            between: spare.rings.iter_mut().map(Ring::share).collect(),
            halos,
            works,
            chunks,
            state: Mutex::new(State { fronts, until: Instant::now(), failed: false }),
            news: Condvar::new(),
        };
        loop {
            flow.state().until = Instant::now() + PAUSE;
            parallel::for_each(self.threads, WORKERS, |_| flow.work());
            let done = flow.done(&flow.state());
            if !goes_on(done) {
                return Err(NetError::Stopped);
            }
            if done == height {
                break;
            }
        }
        drop(flow);
        if spare.rings.iter().map(Ring::size).sum::<usize>() <= KEPT {
            *network.spare.lock().unwrap_or_else(PoisonError::into_inner) = Some(spare);
        }
        Ok(())
    }
}

/// A panel at work.
struct Flow<'a> {
    network: &'a Network,
    panel: &'a Panel,
    image: &'a [f32],
    shape: [usize; 3],
    clean: Mutex<&'a mut [f32]>,
    works: Vec<Work<'a>>,
    /// Of each work.
    halos: Vec<usize>,
    /// After each work but the last.
    between: Vec<Shared<'a>>,
    chunks: Vec<Range<usize>>,
    state: Mutex<State>,
    /// A task is complete, or something failed.
    news: Condvar,
}

/// The next rows of a work in a chunk of the columns.
struct Task<'t, 'a> {
    flow: &'t Flow<'a>,
    work: usize,
    chunk: usize,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Drop for Task<'_, '_> {
    /// The task is complete, or panicked.
    fn drop(&mut self) {
        let mut state = self.flow.state();
        state.failed |= std::thread::panicking();
        let done = self.rows.end;
        *self.flow.front(&mut state, self.work, self.chunk) = Front { done, busy: false };
        self.flow.news.notify_all();
    }
}

impl<'a> Flow<'a> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn front<'s>(&self, state: &'s mut State, work: usize, chunk: usize) -> &'s mut Front {
        &mut state.fronts[work * self.chunks.len() + chunk]
    }

    /// The rows that a work has done in a chunk and the chunks beside it, which its columns reach into.
    fn done_around(&self, state: &State, work: usize, chunk: usize) -> usize {
        let fronts = &state.fronts[work * self.chunks.len()..][..self.chunks.len()];
        let around = chunk.saturating_sub(1)..(chunk + 2).min(fronts.len());
        fronts[around].iter().map(|front| front.done).min().unwrap_or(0)
    }

    /// The rows of the result.
    fn done(&self, state: &State) -> usize {
        let last = &state.fronts[(self.works.len() - 1) * self.chunks.len()..];
        last.iter().map(|front| front.done).min().unwrap_or(0)
    }

    /// Works on tasks until there are no more, or it is time to pause.
    fn work(&self) {
        let mut state = self.state();
        while !state.failed {
            if let Some(task) = self.take(&mut state) {
                drop(state);
                // SAFETY: `take` gives a task away once.
                unsafe { task.run() };
                drop(task);
                state = self.state();
            } else if state.fronts.iter().any(|front| front.busy) {
                state = self.news.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else {
                return;
            }
        }
    }

    /// A task that can be worked on, as late in the network as there is one.
    fn take(&self, state: &mut State) -> Option<Task<'_, 'a>> {
        if Instant::now() >= state.until {
            return None;
        }
        for work in (0..self.works.len()).rev() {
            for chunk in 0..self.chunks.len() {
                let rows = self.next(state, work, chunk);
                if !rows.is_empty() {
                    self.front(state, work, chunk).busy = true;
                    let columns = self.chunks[chunk].clone();
                    return Some(Task { flow: self, work, chunk, rows, columns });
                }
            }
        }
        None
    }

    /// The rows that a work can do next in a chunk: none while the one before has not come far enough,
    /// or while the one after still needs the rows that would be overwritten.
    fn next(&self, state: &State, work: usize, chunk: usize) -> Range<usize> {
        let Front { done, busy } = state.fronts[work * self.chunks.len() + chunk];
        let height = self.shape[1];
        let end = (done + STEP).min(height);
        let ready = || {
            let needed = (end + self.halos[work]).min(height);
            work == 0 || self.done_around(state, work - 1, chunk) >= needed
        };
        let room = || {
            self.between.get(work).is_none_or(|between| {
                let read = self.done_around(state, work + 1, chunk);
                end <= read.saturating_sub(self.halos[work + 1]) + between.rows()
            })
        };
        done..if !busy && ready() && room() { end } else { done }
    }
}

impl Task<'_, '_> {
    /// # Safety
    /// No task may be run twice, and only if [`Flow::next`] yields its rows. Then tasks write different
    /// rows or columns of a ring, into slots of rows that nobody needs any more, and what they read is
    /// complete.
    unsafe fn run(&self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.flow.works[self.work] {
                Work::Convolve(layer) => self.convolve(layer),
                Work::Gate(unit) => self.gate(unit),
                Work::Finish => self.finish(),
            }
        }
    }

    /// What the work before wrote, and what this one is to write.
    fn before(&self) -> Shared<'_> {
        self.flow.between[self.work - 1]
    }

    fn after(&self) -> Shared<'_> {
        self.flow.between[self.work]
    }

    /// Rows of a convolution.
    ///
    /// # Safety
    /// As [`Task::run`].
    unsafe fn convolve(&self, layer: &Layer) {
        // SAFETY: the caller's promise.
        let x = unsafe { self.after().rows_mut(self.rows.clone(), self.columns.clone()) };
        let relu = layer.unit.is_none();
        let sink = |rows: Range<usize>| Sink { rows: &x[rows], relu };
        let pixels = self.columns.len();
        match &layer.conv {
            Conv::Dense(weights) => {
                let mut scratch = Scratch::new(weights.scratch(pixels.div_ceil(TILE)));
                for top in (0..x.len()).step_by(TILE) {
                    let first = (self.rows.start + top) as isize - 1;
                    // SAFETY: nobody writes to these pixels of the input.
                    let row =
                        |y| unsafe { self.before().row(first + y as isize, self.columns.start, 1) };
                    simd::dispatch(Convolve {
                        weights,
                        rows: std::array::from_fn::<_, EXTENT, _>(row),
                        pixels,
                        scratch: &mut scratch,
                        sink: sink(top..(top + TILE).min(x.len())),
                    });
                }
            }
            Conv::First(weights) => {
                let k = weights.k();
                let patch = self.patch(k / 2);
                let (height, width) = (x.len() + k - 1, pixels + k - 1);
                for y in 0..x.len() {
                    let rows: Vec<_> = (0..weights.inputs() * k)
                        .map(|i| &patch[(i / k * height + y + i % k) * width..][..width])
                        .collect();
                    let sink = sink(y..y + 1);
                    simd::dispatch(First { weights, rows: &rows, pixels, sink });
                }
            }
        }
    }

    /// The pixels of the image that are read, (channels, rows, columns), with what comes ahead of the
    /// network and zeros around the image.
    fn patch(&self, halo: usize) -> Scratch<f32> {
        let Flow { image, shape: [channels, height, full], panel, network, .. } = *self.flow;
        let (rows, columns) = (self.rows.len() + 2 * halo, self.columns.len() + 2 * halo);
        let mut patch = Scratch::new(channels * rows * columns);
        patch.fill(0.0);
        let left = halo.saturating_sub(self.columns.start);
        let start = (self.columns.start + left).saturating_sub(halo);
        let end = (self.columns.end + halo).min(panel.region.len());
        for (i, out) in patch.chunks_exact_mut(columns).enumerate() {
            let (plane, y) = (i / rows, (self.rows.start + i % rows).wrapping_sub(halo));
            if y < height {
                let row = &image[(plane * height + y) * full..][panel.region.clone()];
                let (scale, shift) = network.before.of(plane);
                for (out, &x) in out[left..].iter_mut().zip(&row[start..end]) {
                    *out = scale * x + shift;
                }
            }
        }
        patch
    }

    /// Gates rows of a unit.
    ///
    /// # Safety
    /// As [`Task::run`].
    unsafe fn gate(&self, weights: &GateWeights) {
        let (halo, pixels) = (weights.k() / 2, self.columns.len());
        let lanes = simd::selected_lanes::<f32>();
        let mut scratch = Scratch::new(weights.scratch(self.rows.len(), pixels, lanes));
        let [height, width] = [self.flow.shape[1], self.flow.panel.region.len()];
        let (top, bottom) = padding(&self.rows, halo, height);
        let (left, right) = padding(&self.columns, halo, width);
        let around = self.rows.start + top - halo..self.rows.end + halo - bottom;
        // SAFETY: the caller's promise.
        unsafe {
            let row = |y, before| self.before().row(y as isize, self.columns.start, before);
            let out = self.after().rows_mut(self.rows.clone(), self.columns.clone());
            simd::dispatch(Gated {
                weights,
                v: &around.map(|y| row(y, halo - left)).collect::<Vec<_>>(),
                x: &self.rows.clone().map(|y| row(y, 0)).collect::<Vec<_>>(),
                padding: [top, bottom, left, right],
                pixels,
                out: &out,
                scratch: &mut scratch,
            });
        }
    }

    /// The last convolution, and its sum with the image.
    ///
    /// # Safety
    /// As [`Task::run`].
    unsafe fn finish(&self) {
        let Flow { image, shape: [_, height, full], panel, network, ref clean, .. } = *self.flow;
        let (start, end) =
            (panel.region.start + self.columns.start, panel.region.start + self.columns.end);
        let columns = start.max(panel.core.start)..end.min(panel.core.end);
        if columns.is_empty() {
            return;
        }
        let (weights, sign, input) = (&network.tail, network.sign(), self.before());
        let halo = weights.k() / 2;
        let mut out = Scratch::new(weights.outputs() * columns.len());
        for y in self.rows.clone() {
            let rows: Vec<_> = (0..weights.k())
                .map(|i| (y + i) as isize - halo as isize)
                // SAFETY: nobody writes to these pixels meanwhile.
                .map(|y| unsafe { input.row(y, columns.start - panel.region.start, halo) })
                .collect();
            simd::dispatch(Last { weights, rows: &rows, out: &mut out });
            let mut clean = clean.lock().unwrap_or_else(PoisonError::into_inner);
            for (plane, out) in out.chunks_exact(columns.len()).enumerate() {
                let at = (plane * height + y) * full + columns.start;
                let pixels = clean[at..][..columns.len()].iter_mut().zip(&image[at..]);
                for ((clean, &x), &out) in pixels.zip(out) {
                    *clean = x + sign * out;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_whole_tiles_and_no_halo_reaches_beyond_the_next() {
        for halo in [1, 4, 40, 100, 300] {
            for width in 1..1500 {
                let chunks = chunks(width, halo);
                assert!(chunks[0].start == 0 && chunks[chunks.len() - 1].end == width);
                for pair in chunks.windows(2) {
                    assert!(pair[0].end == pair[1].start && pair[0].end.is_multiple_of(TILE));
                    assert!(pair.iter().all(|chunk| chunk.len() >= halo), "{width}, {halo}");
                }
            }
        }
    }
}
