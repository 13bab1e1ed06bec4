//! Loops that do one thing only, as fast as the machine can: what the other kernels are measured by.

use std::hint::black_box;

use crate::simd::{Kernel, Scalar, Simd};

/// Fused multiply-adds on accumulators that never leave their registers.
///
/// Returns how many floating-point operations that were (two per lane and multiply-add) and the sum
/// of the accumulators, without which the compiler would drop them.
pub struct MultiplyAdd {
    pub rounds: usize,
}

impl<T: Scalar> Kernel<T> for MultiplyAdd {
    type Output = (usize, T);

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) -> (usize, T) {
        // A multiply-add waits for its accumulator, four cycles or so, while two to four more could
        // start in each: 16 chains at most keep every unit busy. Of 32 registers 24 are taken, of
        // 16 then 12; two hold the operands.
        if const { S::TILE_VECTORS == 4 } {
            chains::<T, S, 24>(simd, self.rounds)
        } else {
            chains::<T, S, 12>(simd, self.rounds)
        }
    }
}

#[inline(always)]
fn chains<T: Scalar, S: Simd<T>, const N: usize>(simd: S, rounds: usize) -> (usize, T) {
    // Operands that the compiler cannot know, and chains that all differ: nothing to fold or merge.
    // Every chain tends to 2, far from overflow and from denormal numbers.
    let factor = simd.splat(black_box(T::from_f64(0.5)));
    let term = simd.splat(black_box(T::ONE));
    let mut chains = [term; N];
    for (i, chain) in chains.iter_mut().enumerate() {
        *chain = simd.splat(black_box(T::from_f64(i as f64)));
    }
    for _ in 0..rounds {
        for chain in &mut chains {
            *chain = simd.fma(*chain, factor, term);
        }
    }
    let mut sum = T::ZERO;
    for chain in chains {
        sum = T::ONE.fma(simd.sum(chain), sum);
    }
    (2 * N * simd.lanes() * rounds, sum)
}

/// Vectors that the two loops below move at a time.
const UNROLL: usize = 8;

/// Reads `from` once; returns its sum, without which the compiler would not read.
pub struct Read<'a, T> {
    pub from: &'a [T],
}

impl<T: Scalar> Kernel<T> for Read<'_, T> {
    type Output = T;

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) -> T {
        let lanes = simd.lanes();
        let mut sums = [simd.splat(T::ZERO); UNROLL];
        for block in self.from.chunks_exact(UNROLL * lanes) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: i < UNROLL, and the block has UNROLL vectors.
                *sum = simd.add(*sum, unsafe { simd.load(block.as_ptr().add(i * lanes)) });
            }
        }
        let mut total = T::ZERO;
        for sum in sums {
            total = T::ONE.fma(simd.sum(sum), total);
        }
        total
    }
}

/// Copies `from` to `to`, except what is left over beyond the last whole block of vectors.
///
/// The stores are ordinary ones, like those of the other kernels: the memory behind them is read
/// before it is written.
pub struct Copy<'a, T> {
    pub from: &'a [T],
    pub to: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for Copy<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let lanes = simd.lanes();
        let blocks = self.from.chunks_exact(UNROLL * lanes);
        for (from, to) in blocks.zip(self.to.chunks_exact_mut(UNROLL * lanes)) {
            for i in 0..UNROLL {
                // SAFETY: i < UNROLL, and both blocks have UNROLL vectors.
                unsafe {
                    simd.store(
                        simd.load(from.as_ptr().add(i * lanes)),
                        to.as_mut_ptr().add(i * lanes),
                    );
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd;

    #[test]
    fn the_loops_do_what_they_claim_on_every_instruction_set() {
        let from: Vec<f32> = (0..1024).map(|i| (i % 7) as f32).collect();
        for isa in simd::available() {
            let (flops, sum) = f32::dispatch(isa, MultiplyAdd { rounds: 100 });
            // Every lane ends at 2, the fixed point of x / 2 + 1.
            assert_eq!(sum, 2.0 * flops as f32 / 200.0, "{isa}");
            assert_eq!(f32::dispatch(isa, Read { from: &from }), from.iter().sum::<f32>(), "{isa}");
            let mut to = vec![f32::NAN; from.len()];
            f32::dispatch(isa, Copy { from: &from, to: &mut to });
            assert_eq!(to, from, "{isa}");
        }
    }
}
