;; Grows by a page until it is refused, then asks 10,000 times more. Gets exactly its limit, and -1 each time after.
(module
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $i i32)
    (loop $l (br_if $l (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
    (loop $m
      (if (i32.ne (memory.grow (i32.const 1)) (i32.const -1)) (then (return (i32.const -1))))
      (br_if $m (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 10000))))
    (memory.size)))
