"""The difficulty of the phantom: every number that makes an image harder to read, or a report less telling.

Aim: a reader who knows what was drawn finds the report among 512 (R@10 >= 0.95), while a small encoder trained for long
at 96 px stays under 0.6 and one trained for three minutes is clearly above chance. Coarse attributes (heart, effusion,
devices, inspiration, spine) are the early gain, fine ones (granulomas, clips, fractures, scars) the long tail.
Contrasts are in units of attenuation: a lung is 0.5 less than the soft tissue around it, quantum noise 0.024.
"""

from __future__ import annotations

# One factor on every lesion: below 0.6 a human no longer sees half of the small ones, above 1.5 they shine.
LESION_CONTRAST = 0.6
# Peak contrast of each kind of lesion. Opacities of real films are often fainter than a rib (0.12).
CONTRAST = {
    "opacity": 0.13,
    "pneumonia": 0.20,
    "consolidation": 0.30,
    "nodule": 0.15,
    "mass": 0.27,
    "effusion": 0.42,
    "edema": 0.20,
    "atelectasis": 0.18,
    "pleural_thickening": 0.24,
    "hernia": 0.22,
    "granuloma": 0.40,
    "fracture": 0.25,
}
# One factor on the size of lesions: small ones are lost when a film is prepared at 128 px.
LESION_SIZE = 1.0
# Radius of a nodule, of a mass and of a granuloma, where the half width of a film is 1 (about 18 cm).
NODULE_RADIUS = (0.026, 0.045)
MASS_RADIUS = (0.075, 0.13)
GRANULOMA_RADIUS = (0.010, 0.018)

# Quantum noise of a pixel at normal exposure where a film has NOISE_SIZE of them a side: a larger pixel counts more
# quanta, so that a film that is drawn small is as noisy as one that is made small. The under-exposed one has twice
# as much.
NOISE = 0.036
NOISE_SIZE = 320
# Pose of the patient on the film: degrees, shift and log scale, one standard deviation each.
POSE_ANGLE = 3.5
POSE_SHIFT = 0.06
POSE_SCALE = 0.07
# Variation of the exposure (offset, slope of the film curve) beside the drawn class, one standard deviation.
EXPOSURE_JITTER = 0.12
# How far a rotated patient turns (shift of the medial clavicles against the spine) and a scoliotic spine bends.
ROTATION = 0.037
SCOLIOSIS = 0.06
# Spread of a patient's anatomy about the mean (chest width, heart axis, rib slope…), a factor on all of it.
ANATOMY_SPREAD = 1.0
# Height of the diaphragm with a low and a deep breath against a normal one, and the spread within a class.
BREATH = {"low": -0.15, "normal": 0.0, "hyper": 0.10}
BREATH_SPREAD = 0.045
# Tubes, leads, clips and wires against a rib of 0.16: in full contrast they are seen at any size.
DEVICE_CONTRAST = 0.45
# Films with foreign objects (coins, buttons, plates, pendants), at most how many, and the side of one as a share of the
# film's: as large as those of Object-CXR, so that an encoder that has read of them has something to find there.
OBJECT_SHARE = 0.3
OBJECT_MOST = 2
OBJECT_SIZE = (0.05, 0.14)
# How far a drawn class of heart size spreads: neighbouring classes overlap a little, as readers disagree.
HEART_SPREAD = 0.05

# A normal value ("heart size is normal") and an abnormal incidental value is put in words with this probability.
SAY_NORMAL = 0.6
SAY_INCIDENTAL = 0.93
# PA or AP is evident from the film and mostly left to the header, which no encoder reads.
SAY_VIEW = 0.5
# Hedged wording ("may represent") of an opacity.
HEDGE = 0.35
# Reports of normal films dictated from a macro, without a word of variation: the exact repeats of a real corpus.
MACRO = 0.5
