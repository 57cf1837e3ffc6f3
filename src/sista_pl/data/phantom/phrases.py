"""The words of the phantom's reports: for each statement several wordings, the first of which is the macro's.

`{place}` is a side and a zone, `{side}` and `{Side}` a side, `{grade}` a severity with a blank behind it.
"""

from __future__ import annotations

ZONE_WORDS = {
    "upper": ("upper lobe", "upper lung", "upper zone"),
    "middle": ("mid lung", "mid zone", "middle third"),
    "lower": ("lower lobe", "lung base", "lower zone"),
}

# Finding → (in the findings, in the impression); the placeholders that a wording leaves out are not stated by it.
FINDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "effusion": (
        (
            "There is a {grade}{side} pleural effusion.",
            "{Grade}{side} pleural effusion is present.",
            "Blunting of the {side} costophrenic angle, in keeping with a {grade}effusion.",
            "A {grade}layering {side} effusion is seen.",
        ),
        ("{Grade}{side} pleural effusion.", "{Side} pleural effusion, {grade}in size."),
    ),
    "pneumothorax": (
        (
            "There is a {grade}{side} pneumothorax.",
            "A {grade}{side} apical pneumothorax with a visible visceral pleural line.",
            "{Grade}pneumothorax on the {side}.",
        ),
        ("{Grade}{side} pneumothorax.", "Pneumothorax on the {side}, {grade}in size."),
    ),
    "consolidation": (
        (
            "{Grade}consolidation in {place}.",
            "There is {grade}air space consolidation of {place}.",
            "Dense {grade}opacification of {place} with air bronchograms.",
        ),
        ("Consolidation in {place}.", "{Grade}consolidation of {place}."),
    ),
    "opacity": (
        (
            "{Grade}opacity in {place}.",
            "There is a {grade}hazy opacity projecting over {place}.",
            "{Grade}ground-glass density in {place}.",
        ),
        ("{Grade}opacity in {place}, follow-up advised.", "Opacity in {place}."),
    ),
    "pneumonia": (
        (
            "Ill-defined opacity in {place} concerning for pneumonia.",
            "Patchy air space disease in {place}, compatible with pneumonia.",
            "Heterogeneous infiltrate of {place} suspicious for infection.",
        ),
        ("Pneumonia of {place}.", "Findings of pneumonia in {place}."),
    ),
    "atelectasis": (
        (
            "{Grade}atelectasis at the {side} base.",
            "There is {grade}{side} basilar atelectasis.",
            "{Grade}{side} lower lobe atelectasis with mild volume loss.",
        ),
        ("{Side} basilar atelectasis.", "{Grade}atelectasis at the {side} base."),
    ),
    "edema": (
        (
            "{Grade}pulmonary edema.",
            "Indistinct perihilar vessels in keeping with {grade}pulmonary edema.",
            "Bilateral perihilar haze reflecting {grade}edema.",
        ),
        ("{Grade}pulmonary edema.", "{Grade}pulmonary edema, likely cardiogenic."),
    ),
    "nodule": (
        (
            "There is a small nodule in {place}.",
            "Nodular density projecting over {place}.",
            "A subcentimeter nodule is noted in {place}.",
        ),
        ("Nodule in {place}; CT is recommended.", "Pulmonary nodule, {place}."),
    ),
    "mass": (
        (
            "There is a mass in {place}.",
            "Large rounded mass projecting over {place}.",
            "A lobulated mass is seen in {place}.",
        ),
        ("Mass in {place}, concerning for malignancy.", "Pulmonary mass of {place}."),
    ),
    "cardiomegaly": (
        (
            "The heart is {grade}enlarged.",
            "{Grade}cardiomegaly.",
            "The cardiac silhouette is {grade}enlarged.",
            "{Grade}enlargement of the heart.",
        ),
        ("{Grade}cardiomegaly.", "Cardiomegaly, {grade}in degree."),
    ),
    "emphysema": (
        (
            "The lungs are hyperinflated with flattened diaphragms, consistent with {grade}emphysema.",
            "{Grade}emphysematous change with increased lung volumes.",
        ),
        ("{Grade}emphysema.", "Hyperinflation from {grade}emphysema."),
    ),
    "hernia": (
        (
            "Retrocardiac density with an air-fluid level, consistent with a hiatal hernia.",
            "Moderate hiatal hernia is seen behind the heart.",
        ),
        ("Hiatal hernia.", "Hiatus hernia."),
    ),
    "pleural_thickening": (
        (
            "{Side} pleural thickening.",
            "There is thickening of the {side} lateral pleura.",
        ),
        ("{Side} pleural thickening.", "Chronic pleural thickening on the {side}."),
    ),
    "fracture": (
        (
            "Acute fracture of a {side} rib.",
            "There is a minimally displaced {side} rib fracture.",
        ),
        ("{Side} rib fracture.", "Acute rib fracture on the {side}."),
    ),
    "endotracheal_tube": (
        ("Endotracheal tube ends above the carina.", "The endotracheal tube is in standard position."),
        ("Endotracheal tube in place.",),
    ),
    "nasogastric_tube": (
        ("Nasogastric tube courses into the stomach.", "An enteric tube ends below the diaphragm."),
        ("Enteric tube in the stomach.",),
    ),
    "central_line": (
        ("{Side} internal jugular line ends in the SVC.", "A {side} jugular central venous catheter is in place."),
        ("{Side} jugular line in the SVC.",),
    ),
    "picc": (
        ("{Side} PICC ends in the low SVC.", "A {side} sided PICC line is in place."),
        ("{Side} PICC in place.",),
    ),
    "chest_tube": (
        ("A {side} chest tube is in place.", "{Side} pleural drain remains in position."),
        ("{Side} chest tube in place.",),
    ),
    "coin": (
        ("A coin projects over {place}.", "Coin overlying {place}.", "Round metallic disc over {place}."),
        ("Coin over {place}.",),
    ),
    "button": (
        ("A button projects over {place}.", "Button overlying {place}.", "Ring-shaped button over {place}."),
        ("Button over {place}.",),
    ),
    "plate": (
        ("A rectangular metal plate projects over {place}.", "Metallic plate overlying {place}."),
        ("Metallic plate over {place}.",),
    ),
    "pendant": (
        ("A pendant projects over {place}.", "Pendant of a necklace overlying {place}.", "Jewelry over {place}."),
        ("Pendant over {place}.",),
    ),
}

HEDGED = {
    "opacity": (
        "Opacity in {place} may represent atelectasis, infection cannot be excluded.",
        "Subtle opacity in {place}, possibly early pneumonia.",
    ),
    "pneumonia": (
        "Opacity in {place} may represent pneumonia in the appropriate setting.",
        "Opacity in {place}; pneumonia cannot be excluded.",
    ),
    "nodule": ("Possible nodule in {place}, which may represent a summation shadow.",),
    "atelectasis": ("Opacity at the {side} base, likely atelectasis.",),
}

# Grade → wordings; "linear" and "segmental" and the like stand for themselves.
GRADES = {
    "small": ("small", "tiny", "small"),
    "mild": ("mild", "mild", "slight"),
    "extensive": ("extensive", "large"),
    "faint": ("faint", "subtle"),
    "linear": ("linear", "plate-like", "subsegmental"),
    "moderate": ("moderate", "moderate"),
}
# Words that make an adverb before "enlarged".
ADVERBS = {"mild": "mildly", "moderate": "moderately", "severe": "severely", "slight": "slightly"}

# Incidental attribute → value → wordings.
INCIDENTAL: dict[str, dict[str, tuple[str, ...]]] = {
    "view": {
        "PA": ("PA view.", "Upright PA radiograph."),
        "AP": ("AP portable view.", "Portable AP radiograph."),
    },
    "rotation": {
        "left": ("The patient is rotated to the left.", "Leftward patient rotation."),
        "right": ("The patient is rotated to the right.", "Rightward patient rotation."),
    },
    "inspiration": {
        "normal": ("Lung volumes are normal.", "Adequate inspiration."),
        "low": ("Lung volumes are low.", "Low lung volumes.", "Shallow inspiration."),
        "hyper": ("Lung volumes are large.", "Large lung volumes.", "Deep inspiration with large lung volumes."),
    },
    "exposure": {
        "under": ("The film is underexposed.", "Underpenetrated technique."),
        "over": ("The film is overexposed.", "Overpenetrated technique."),
    },
    "heart": {
        "normal": ("The heart is normal in size.", "Heart size is normal.", "Normal cardiac silhouette."),
    },
    "aorta": {
        "normal": ("Mediastinal contours are normal.", "The aorta is unremarkable.", "Normal mediastinum."),
        "tortuous": ("The aorta is tortuous.", "Tortuous thoracic aorta.", "Unfolded, tortuous aorta."),
        "calcified": ("The aortic knob is calcified.", "Calcification of the aortic arch.", "Atherosclerotic aorta."),
    },
    "spine": {
        "normal": ("The spine is straight and intact.", "No spinal abnormality."),
        "degenerative": (
            "Degenerative changes of the thoracic spine.",
            "Bridging osteophytes in the spine.",
            "Thoracic spondylosis.",
        ),
        "scoliosis/left": ("Levoconvex scoliosis.", "Scoliosis convex to the left."),
        "scoliosis/right": ("Dextroconvex scoliosis.", "Scoliosis convex to the right."),
    },
    "diaphragm": {
        "elevated/left": ("Elevated left hemidiaphragm.", "The left hemidiaphragm is elevated."),
        "elevated/right": ("Elevated right hemidiaphragm.", "The right hemidiaphragm is elevated."),
    },
    "granuloma": {
        f"{side}/{zone}": (
            f"Calcified granuloma in the {side} {words[0]}.",
            f"Granuloma of the {side} {words[1]}.",
            f"Small calcified granuloma, {side} {words[2]}.",
        )
        for side in ("left", "right")
        for zone, words in ZONE_WORDS.items()
    },
    "rib_deformity": {
        side: (f"Old healed {side} rib fractures.", f"Chronic deformity of {side} sided ribs.")
        for side in ("left", "right")
    },
    "clips": {
        "right upper quadrant": ("Cholecystectomy clips.", "Surgical clips in the right upper quadrant."),
        "left axilla": ("Surgical clips in the left axilla.", "Left axillary clips."),
        "right axilla": ("Surgical clips in the right axilla.", "Right axillary clips."),
    },
    "sternotomy": {
        "present": ("Median sternotomy wires are intact.", "Status post sternotomy and bypass surgery."),
    },
    "shoulder": {
        side: (f"{side.capitalize()} shoulder arthroplasty.", f"Prosthesis of the {side} shoulder.")
        for side in ("left", "right")
    },
    "hilar_nodes": {
        side: (f"Calcified {side} hilar lymph nodes.", f"Calcified nodes at the {side} hilum.")
        for side in ("left", "right")
    },
    "scarring": {
        "left": ("Left apical scarring.", "Scarring at the left apex."),
        "right": ("Right apical scarring.", "Scarring at the right apex."),
        "bilateral": ("Biapical scarring.", "Scarring at both apices."),
    },
    "pacemaker": {
        side: (f"{side.capitalize()} chest wall pacemaker with two leads.", f"Dual lead {side} sided pacemaker.")
        for side in ("left", "right")
    },
    "port": {
        side: (f"{side.capitalize()} chest port ends in the SVC.", f"{side.capitalize()} sided infusion port.")
        for side in ("left", "right")
    },
}

# What is denied in one sentence: (finding kinds, wordings); said only where none of them was drawn.
DENIALS = (
    (("effusion", "pneumothorax"), ("No pleural effusion or pneumothorax.", "There is no pneumothorax or effusion.")),
    (("effusion",), ("No pleural effusion.", "The costophrenic angles are sharp.")),
    (("pneumothorax",), ("No pneumothorax.", "There is no pneumothorax.")),
    (
        ("consolidation", "pneumonia", "opacity"),
        ("No focal consolidation.", "No air space disease.", "No evidence of pneumonia."),
    ),
    (("edema",), ("No pulmonary edema.", "The pulmonary vasculature is normal.")),
    (("nodule", "mass"), ("No nodule or mass.", "No suspicious nodule.")),
    (("fracture",), ("No acute fracture.", "No displaced rib fracture.")),
)
CLEAR = ("The lungs are clear.", "Lungs are clear bilaterally.", "Clear lungs.")
NORMAL_IMPRESSION = (
    "No acute cardiopulmonary process.",
    "No acute cardiopulmonary abnormality.",
    "No acute intrathoracic process.",
    "Normal chest radiograph without acute disease.",
)
EXAMINATIONS = {"PA": "CHEST (PA AND LAT)", "AP": "CHEST (PORTABLE AP)"}
INDICATIONS = (
    "___ year old with cough and fever // pneumonia?",
    "___F with shortness of breath // eval for acute process",
    "___M with chest pain // r/o pneumothorax",
    "___ year old in the intensive care unit // interval change",
    "History of ___ with weakness.  Please evaluate.",
    "___ year old with hypoxia // edema or effusion?",
)
